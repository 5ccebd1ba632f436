"""Models spread over two processes, on the CPU or two GPUs: DDP, FSDP1 and FSDP2 train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import muddformer
from helpers.models import make, scramble, some_ids
from helpers.processes import run_processes
from muddformer.models.layers import Block

PROCESSES = 2
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="needs two CUDA devices")


def train(model: nn.Module, ids: torch.Tensor, steps: int = 3) -> float:
    """The loss after a few steps of plain gradient descent, short ones: rounding is not to grow from step to step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    for _ in range(steps):
        loss = model(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def work(rank: int, folder: str, name: str, kind: str, backend: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = scramble(make(name), 0.1).to(device)
    ids = some_ids(length=8).to(device)
    if kind == "ddp":
        train(nn.parallel.DistributedDataParallel(model), ids)
        model.save_pretrained(f"{folder}/rank{rank}")
    elif kind == "fsdp1":  # with its defaults: one flat parameter a block, which the block alone may use
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=device)
        train(wrapped, ids)
        with torch.no_grad():
            wrapped.eval()(ids)
        kept = FullyShardedDataParallel(make(name).to(device), use_orig_params=True, device_id=device)
        for sharded in (wrapped, kept):
            with pytest.raises(ValueError, match=r"model must be whole to be saved, .*summon_full_params"):
                sharded.save_pretrained(f"{folder}/rank0")
        with pytest.raises(TypeError, match=r"pass the model inside, .*summon_full_params"):
            muddformer.save_pretrained(wrapped, f"{folder}/rank0")
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            if rank == 0:
                wrapped.module.save_pretrained(f"{folder}/rank0")
    else:
        mesh = init_device_mesh(device.type, (PROCESSES,))
        if kind == "fsdp2-compiled-checkpointed":
            model.gradient_checkpointing = True
            for layer in model.layers:
                layer.compile(backend="aot_eager")
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, ids)
        model.save_pretrained(f"{folder}/rank0")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.cuda, two_gpus])])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("default", "ddp"),
        ("default", "fsdp1"),
        ("default", "fsdp2"),
        ("default", "fsdp2-compiled-checkpointed"),
        ("pre-post", "ddp"),
        ("pre-post", "fsdp2"),
    ],
)
def test_trains_as_one_process_does(tmp_path: Path, name: str, kind: str, backend: str) -> None:
    run_processes(work, (str(tmp_path), name, kind, backend), PROCESSES)
    torch.manual_seed(0)
    alone = scramble(make(name), 0.1)
    train(alone, some_ids(length=8))
    together = muddformer.from_pretrained(tmp_path / "rank0")
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_positions_stay_in_float32(kind: str) -> None:
    """The mixed precision of FSDP casts what blocks are called with; positions in 16 bits would be other positions."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, seen = make(), []
        for layer in model.layers:
            layer.attention.register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[3].cos.dtype)))
        if kind == "fsdp1":
            policy = MixedPrecision(param_dtype=torch.bfloat16, cast_forward_inputs=True)
            options = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "device_id": torch.device("cpu")}
            model = FullyShardedDataParallel(model, mixed_precision=policy, **options)
        else:
            for layer in model.layers:
                fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
            fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        model(some_ids())
        assert set(seen) == {(torch.bfloat16, torch.float32)}
    finally:
        dist.destroy_process_group()
