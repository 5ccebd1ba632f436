"""Norms of the heads of queries and keys, and their rotation."""

from __future__ import annotations

import pytest
import torch

from helpers.block_samples import find
from helpers.block_samples import qk_samples as samples
from muddformer import ops, reference


def test_keeps_its_inputs_alone(device: torch.device) -> None:
    for name, kept_numbers in (("grouped", [0, 1, 2, 3, 4, 5]), ("no-norms", [2, 3])):
        leaves = find(samples, name, device, torch.float32).detached()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            leaves.run(ops.qk_norm_rotary)
        assert [t.data_ptr() for t in kept] == [leaves.tensors[i].data_ptr() for i in kept_numbers]


def test_autocast(device: torch.device) -> None:
    """Tables and float32 weights stay as they are."""
    q, k, *rest = find(samples, "grouped", device, torch.float32).tensors
    with torch.autocast(device.type, torch.bfloat16):
        ours = ops.qk_norm_rotary(q, k, *rest)
    for a, b in zip(ours, ops.qk_norm_rotary(q.bfloat16(), k.bfloat16(), *rest), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


@pytest.mark.cuda
def test_more_than_2_to_the_31_entries() -> None:
    tokens, heads, width = 2**16 + 1, 512, 64
    q = torch.randn(1, tokens, heads, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    k = torch.randn(1, tokens, 1, width, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(tokens, width // 2, device="cuda")
    weight = torch.ones(width, device="cuda")
    y, _ = ops.qk_norm_rotary(q, k, angles.cos(), angles.sin(), weight, weight)
    grad = torch.autograd.grad(y, q, y.detach())[0]
    last = slice(-2, None)
    few, tables = q[:, last].detach().float().requires_grad_(), (angles[last].cos(), angles[last].sin())
    expected, _ = reference.qk_norm_rotary(few, k[:, last].float(), *tables, weight, weight)
    torch.testing.assert_close(y[:, last].float(), expected, rtol=1e-2, atol=2e-2)
    expected_grad = torch.autograd.grad(expected, few, y[:, last].detach().float())[0]
    torch.testing.assert_close(grad[:, last].float(), expected_grad, rtol=2e-2, atol=2e-2)
