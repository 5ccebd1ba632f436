"""SwiGLU's product of gate and value."""

from __future__ import annotations

import pytest
import torch

from helpers.block_samples import find
from helpers.block_samples import swiglu_samples as samples
from muddformer import ops, reference


def test_keeps_its_inputs_alone(device: torch.device) -> None:
    """Nothing is saved but gate and up, once each; of gate and up in one tensor that one."""
    for name in ("apart-4x64", "fused-5x272"):
        leaves = find(samples, name, device, torch.float32).detached()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            leaves.run(ops.swiglu)
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in leaves.leaves()]


def test_autocast(device: torch.device) -> None:
    sample = find(samples, "apart-4x64", device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        y = sample.run(ops.swiglu)[0]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.swiglu(*(t.bfloat16() for t in sample.tensors)))


@pytest.mark.cuda
def test_more_than_2_to_the_31_entries() -> None:
    gate = torch.randn(2**20 + 1, 2048, device="cuda", dtype=torch.bfloat16).requires_grad_()
    up = torch.randn_like(gate)
    y = ops.swiglu(gate, up)
    grad = torch.autograd.grad(y, gate, y.detach())[0]
    last = slice(-3, None)
    few = gate[last].detach().float().requires_grad_()
    expected = reference.swiglu(few, up[last].float())
    torch.testing.assert_close(y[last].float(), expected, rtol=1e-2, atol=1e-2)
    expected_grad = torch.autograd.grad(expected, few, y[last].detach().float())[0]
    torch.testing.assert_close(grad[last].float(), expected_grad, rtol=1e-2, atol=1e-2)
