"""Calls one after another: whatever came before, a call gives what it gives alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.every_operator import everything, inputs, outputs
from helpers.op_samples import DTYPES
from helpers.paths import ROOT
from muddformer import ops

SHAPES = [(1, 1), (2, 3), (3, 67), (1, 300), (4, 130)]  # the last is the largest


def made(leading: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(sum(leading))
    return [t.cpu() for t in everything(inputs(leading, 32, dtype, device))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", [(0, 5), (3, 0)], ids=["no batch", "no tokens"])
def test_no_tokens_and_then_more(empty: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    """A launch without blocks would be an error that CUDA reports with the call after it."""
    expected = made((2, 3), device, dtype)
    for result, like in zip(made(empty, device, dtype), expected, strict=True):
        assert result.dtype == like.dtype and result.dim() == like.dim()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(made((2, 3), device, dtype), expected, strict=True))


@pytest.mark.slow
def test_largest_shape_first(device: torch.device, tmp_path: Path) -> None:
    """In processes of their own, since what is found out at a first call may be kept: small to large, and back."""
    results = []
    for shapes in (SHAPES, SHAPES[::-1]):
        path = tmp_path / f"{len(results)}.pt"
        code = (
            f"import sys, torch; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT / 'tests' / 'ops')]!r}\n"
            "from test_order_of_calls import made\n"
            f"made_of = {{shape: made(shape, torch.device('{device}')) for shape in {shapes!r}}}\n"
            f"torch.save(made_of, {str(path)!r})"
        )
        subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=300)
        results.append(torch.load(path))
    for shape in SHAPES:
        assert all(torch.equal(a, b) for a, b in zip(results[0][shape], results[1][shape], strict=True))


@pytest.mark.slow
def test_many_random_lengths(device: torch.device) -> None:
    """2,000 steps, forward and backward: a few lengths are met again and again, and give the same every time."""
    lengths = torch.randint(1, 200, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    seen: dict[int, list[Tensor]] = {}
    hiddens = [torch.randn(200, 24, device=device) for _ in range(3)]
    all_weights = torch.randn(200, 2, 3, device=device)

    def step(length: int) -> list[Tensor]:
        leaves = [x[:length].detach().requires_grad_() for x in [*hiddens, all_weights]]
        streams, _ = ops.depth_aggregate_norm_chained(leaves[:-1], leaves[-1], [hiddens[0][0], None])
        return [*streams, *torch.autograd.grad(sum(y.square().sum() for y in streams), leaves)]

    for length in lengths:
        results = step(length)
        first = seen.setdefault(length, results)
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def memory(device: torch.device) -> int:
    """Bytes that tensors take, or for a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_without_backward(device: torch.device) -> None:
    """A graph that nobody runs backward is freed: no function keeps itself alive by its own outputs."""
    leaves = [t.requires_grad_() for t in inputs((4, 512), 256, torch.float32, device)]  # 2 MiB a hidden state
    for _ in range(5):
        outputs(leaves)
    before = memory(device)
    for _ in range(40):
        outputs(leaves)
    assert memory(device) - before < 40 << 20
