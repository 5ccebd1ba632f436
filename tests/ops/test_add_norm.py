"""Residual addition and the norm after it."""

from __future__ import annotations

import pytest
import torch

from helpers.block_samples import add_norm_samples as samples
from helpers.block_samples import find
from muddformer import ops, reference


def test_keeps_the_sum_and_a_float_a_row(device: torch.device) -> None:
    leaves = find(samples, "rms-5x64", device, torch.float32).detached()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, _ = leaves.run(ops.add_norm)
    assert [t.data_ptr() for t in kept[:2]] == [total.data_ptr(), leaves.tensors[2].data_ptr()]
    assert [t.numel() for t in kept[2:]] == [5, 0]


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(used: int, device: torch.device) -> None:
    """Gradients where only the sum, or only the normed tensor, is used."""
    for name in ("rms-5x64", "layer-5x64"):
        sample = find(samples, name, device, torch.float64)
        ours, naive = (
            torch.autograd.grad(
                leaves.run(function)[used].square().sum(), leaves.leaves(), allow_unused=True, materialize_grads=True
            )
            for function, leaves in ((ops.add_norm, sample.detached()), (reference.add_norm, sample.detached()))
        )
        for a, b in zip(ours, naive, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(residual: torch.dtype, device: torch.device) -> None:
    """The branch and the normed tensor are narrow, the residual stream keeps its dtype."""
    x, stream, weight = find(samples, "rms-5x64", device, torch.float32).tensors[:3]
    stream = stream.to(residual)
    with torch.autocast(device.type, torch.bfloat16):
        total, normed = ops.add_norm(x, stream, weight)
    assert total.dtype == residual and normed.dtype == torch.bfloat16
    expected = ops.add_norm(x.bfloat16(), stream, weight, dtype=torch.bfloat16)
    assert torch.equal(total, expected[0]) and torch.equal(normed, expected[1])


@pytest.mark.cuda
def test_more_than_2_to_the_31_entries() -> None:
    x = torch.randn(2**20 + 1, 2048, device="cuda", dtype=torch.bfloat16)
    stream = torch.randn_like(x).requires_grad_()
    weight = torch.ones(2048, device="cuda")
    last = slice(-3, None)
    total, normed = ops.add_norm(x, stream, weight)
    expected = reference.add_norm(x[last].float(), stream[last].detach().float(), weight)
    for y, w in zip((total, normed), expected, strict=True):
        torch.testing.assert_close(y[last].float(), w, rtol=1e-2, atol=2e-2)
    grad = torch.autograd.grad(normed, stream, x)[0]
    few = total[last].detach().float().requires_grad_()
    expected = torch.autograd.grad(reference.add_norm(few, torch.zeros_like(few), weight)[1], few, x[last].float())[0]
    torch.testing.assert_close(grad[last].float(), expected, rtol=1e-2, atol=2e-2)
