"""A training step that FSDP2 shards over the devices of a host, ours beside the plain model, in one run.

Every block is a unit of its own, and the rest of the model one. Parameters are float32; forward and backward gather
them in bfloat16, gradients are added up in float32; fused AdamW. So the residual stream is bfloat16 in both models, and
there is one plain twin. Runs: eager, block (torch.compile of every block). "ms" is a step by the clock, each waited
for; ratios are to the faster run of the plain model. bytes_deferred_ms is what the connections must move at least, at
the speed of a copy. host_ms is how long the host of the slowest process takes until all of a step is enqueued: where it
comes near ms, the devices wait for it.

    torchrun --nproc-per-node 2 benchmarks/fsdp2_step.py --models 24x2048:4 --csv benchmarks/results/h100_fsdp2_step.csv
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import copy_gb_per_s, parser, write_rows
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import VOCABULARY, Method, Shape, blocks_of, connection_bytes, make_model

STEPS = 12


def start(device_type: str) -> torch.device:
    """Joins the processes of torchrun; the device of this one."""
    cuda, rank = device_type.startswith("cuda"), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device


def mesh_of(device: torch.device) -> DeviceMesh:
    """All devices."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def sharded_step(
    method: Method, shape: Shape, mesh: DeviceMesh, device: torch.device
) -> tuple[Callable[[], tuple[float, float]], float]:
    """A step, which waits for what it enqueues and returns the loss and the host's seconds until it began to wait; and
    the bytes that the connections must move."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device(device):
        model = make_model(method, shape)
    moved = connection_bytes(model, shape)[1]
    if method.run == "block":
        for block in blocks_of(model):
            block.compile(dynamic=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*blocks_of(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    ids, targets = (torch.randint(VOCABULARY, (shape.batch, shape.length), device=device) for _ in range(2))

    def step() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        enqueued = time.perf_counter() - begin
        value = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value, enqueued

    return step, moved


def timed(step: Callable[[], tuple[float, float]]) -> tuple[float, float, float, float]:
    """Seconds of the first step, the median milliseconds of later ones by the clock and of the host, the first loss."""

    def timed_step() -> tuple[float, float, float]:
        dist.barrier()
        begin = time.perf_counter()
        value, enqueued = step()
        return 1e3 * (time.perf_counter() - begin), 1e3 * enqueued, value

    first, _, loss = timed_step()
    for _ in range(3):
        timed_step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ms, host_ms, _ = zip(*(timed_step() for _ in range(STEPS)), strict=True)
    return first / 1e3, statistics.median(ms), statistics.median(host_ms), loss


def measure(method: Method, shape: Shape, mesh: DeviceMesh, device: torch.device) -> dict:
    """The figures of one method, on every process."""
    step, moved = sharded_step(method, shape, mesh, device)
    first, ms, host_ms, loss = timed(step)
    slowest = torch.tensor(host_ms, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    speed = copy_gb_per_s(2**28 if cuda else 2**22, torch.bfloat16, device, 0.2)
    return {
        "ms": round(ms, 3),
        "tokens_per_s": round(mesh.size() * shape.tokens / ms * 1e3),
        "peak_gib": round(peak, 2) if cuda else "",
        "first_step_s": round(first, 1),
        "loss": round(loss, 4),
        "host_ms": round(slowest.item(), 3),
        "bytes_deferred_ms": round(moved / speed / 1e6, 3),
    }


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--models", nargs="+", default=["24x2048:4"], help="layers x width : sequences of a device")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    methods = ["plain-block", "plain-eager", "mudd-block", "mudd-eager"]
    p.add_argument("--methods", nargs="+", default=methods, help="MODEL-RUN as in train_step.py; plain first")
    args = p.parse_args()
    if "LOCAL_RANK" not in os.environ:
        p.error("must be run by torchrun, such as: torchrun --nproc-per-node 2 benchmarks/fsdp2_step.py")
    device = start(args.device)
    mesh, rank, cuda = mesh_of(device), dist.get_rank(), device.type == "cuda"
    for text in args.models:
        shape, plain = Shape.parse(text, 4, args.length), {}
        for name in args.methods:
            figures = measure(Method.parse(name), shape, mesh, device)
            gc.collect()
            if name.startswith("plain") and figures["ms"] < plain.get("ms", float("inf")):
                plain = figures
            row = {"model": str(shape), "method": name, "devices": mesh.size(), "batch": shape.batch}
            row |= {"length": shape.length, **figures, "throughput_of_plain": "", "memory_of_plain": ""}
            if plain:
                row["throughput_of_plain"] = round(plain["ms"] / figures["ms"], 3)
            if plain and cuda:
                row["memory_of_plain"] = round(figures["peak_gib"] / plain["peak_gib"], 3)
            if rank == 0:
                print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
                write_rows([row], args.csv, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
