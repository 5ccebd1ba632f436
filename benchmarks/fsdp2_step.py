"""A training step that FSDP2 shards over the devices of a host, ours beside the plain model, in one run.

Every block is a unit of its own, and the rest of the model one. Parameters are float32; forward and backward gather
them in bfloat16, gradients are added up in float32; fused AdamW. So the residual stream is bfloat16 in both models, and
there is one plain twin. Runs: eager, block (torch.compile of every block). "ms" is a step by the clock, each waited
for: the median over several rounds, in each of which all methods take their turn, as the speed of a host changes from
second to second; ms_low and ms_high are the medians of the fastest and the slowest round. Ratios are to the faster run
of the plain model. bytes_deferred_ms is what the connections must move at least, at the speed of a copy. host_ms is how
long the host of the slowest process takes until all of a step is enqueued: where it comes near ms, the devices wait for
it.

    torchrun --nproc-per-node 2 benchmarks/fsdp2_step.py --models 24x2048:4 --csv benchmarks/results/h100_fsdp2_step.csv
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from common import copy_gb_per_s, parser, write_rows
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import VOCABULARY, Method, Shape, blocks_of, connection_bytes, make_model

STEPS = 12


class Timed(NamedTuple):
    """Steps of one method: seconds of the first, milliseconds of later ones by the clock and of the host, the loss of
    the first, and the peak of memory on the device."""

    first_s: float
    ms: list[float]
    host_ms: list[float]
    loss: float
    peak_gib: float


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


def timed(step: Callable[[], tuple[float, float]]) -> Timed:
    """A first step, a few more, and then ``STEPS`` that count."""

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
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return Timed(first / 1e3, list(ms), list(host_ms), loss, peak)


def measure(
    methods: Sequence[str], shape: Shape, rounds: int, mesh: DeviceMesh, device: torch.device
) -> dict[str, dict[str, float | str]]:
    """The figures of each method, on every process."""
    found: dict[str, list[Timed]] = {name: [] for name in methods}
    moved: dict[str, int] = {}
    for _ in range(rounds):
        for name in methods:
            step, moved[name] = sharded_step(Method.parse(name), shape, mesh, device)
            found[name].append(timed(step))
            del step
            gc.collect()
    cuda = device.type == "cuda"
    speed = copy_gb_per_s(2**28 if cuda else 2**22, torch.bfloat16, device, 0.2)
    return {name: _figures(timings, moved[name] / speed / 1e6, mesh, shape) for name, timings in found.items()}


def _figures(timings: Sequence[Timed], bytes_ms: float, mesh: DeviceMesh, shape: Shape) -> dict[str, float | str]:
    ms = statistics.median(value for timing in timings for value in timing.ms)
    by_round = [statistics.median(timing.ms) for timing in timings]
    host_ms = statistics.median(value for timing in timings for value in timing.host_ms)
    slowest = torch.tensor(host_ms, device=mesh.device_type)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {
        "ms": round(ms, 3),
        "ms_low": round(min(by_round), 3),
        "ms_high": round(max(by_round), 3),
        "tokens_per_s": round(mesh.size() * shape.tokens / ms * 1e3),
        "peak_gib": round(max(timing.peak_gib for timing in timings), 2) or "",
        "first_step_s": round(timings[0].first_s, 1),
        "loss": round(timings[0].loss, 4),
        "host_ms": round(slowest.item(), 3),
        "bytes_deferred_ms": round(bytes_ms, 3),
    }


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--models", nargs="+", default=["24x2048:4"], help="layers x width : sequences of a device")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    methods = ["plain-block", "plain-eager", "mudd-block", "mudd-eager"]
    p.add_argument("--methods", nargs="+", default=methods, help="MODEL-RUN as in train_step.py")
    p.add_argument("--rounds", type=int, default=3, help="how often each method has its turn")
    args = p.parse_args()
    if "LOCAL_RANK" not in os.environ:
        p.error("must be run by torchrun, such as: torchrun --nproc-per-node 2 benchmarks/fsdp2_step.py")
    device = start(args.device)
    mesh, rank, cuda = mesh_of(device), dist.get_rank(), device.type == "cuda"
    for text in args.models:
        shape = Shape.parse(text, 4, args.length)
        measured = measure(args.methods, shape, args.rounds, mesh, device)
        plain = [figures for name, figures in measured.items() if name.startswith("plain")]
        plain = min(plain, key=lambda figures: figures["ms"], default=None)
        for name, figures in measured.items():
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
