"""Models spread over two processes, on the CPU or two GPUs: DDP and FSDP2 train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import muddformer
from helpers.models import make, scramble, some_ids

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
    else:
        mesh = init_device_mesh(device.type, (PROCESSES,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, ids)
        model.save_pretrained(f"{folder}/rank0")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.cuda, two_gpus])])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["default", "pre-post"])
def test_trains_as_one_process_does(tmp_path: Path, name: str, kind: str, backend: str) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path), name, kind, backend), nprocs=PROCESSES)
    torch.manual_seed(0)
    alone = scramble(make(name), 0.1)
    train(alone, some_ids(length=8))
    together = muddformer.from_pretrained(tmp_path / "rank0")
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], value, rtol=1e-3, atol=1e-4)
