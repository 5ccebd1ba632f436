"""Norms of the heads of queries and keys, and their rotation."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from helpers.block_samples import cases, check, find, results_and_gradients
from helpers.block_samples import qk_samples as samples
from muddformer import ops, reference

OP = torch.ops.muddformer.qk_norm_rotary.default
FEW = ["grouped", "no-norms", "slices", "own-positions", "no-tokens"]


@pytest.mark.parametrize(("dtype", "name"), cases(samples))
def test_results_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    check(ops.qk_norm_rotary, reference.qk_norm_rotary, find(samples, name, device, dtype))


@pytest.mark.parametrize("name", ["odd", "odd-no-norms", "own-positions"])
def test_gradcheck(name: str, device: torch.device) -> None:
    leaves = find(samples, name, device, torch.float64).detached()
    wanted = leaves.leaves()

    def call(*given: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(given)
        leaves.tensors = [t if t is None or not t.requires_grad else next(rest) for t in leaves.tensors]
        return tuple(leaves.run(ops.qk_norm_rotary))

    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)


@pytest.mark.parametrize("name", FEW)
def test_opcheck(name: str, device: torch.device) -> None:
    leaves = find(samples, name, device, torch.float32).detached()
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(OP, tuple(leaves.tensors), leaves.options, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    for name in FEW:
        sample = find(samples, name, device, dtype)
        first, second = (results_and_gradients(ops.qk_norm_rotary, sample) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_inputs(device: torch.device) -> None:
    """Each gradient is the same when nothing else needs one."""
    for name in FEW:
        sample = find(samples, name, device, torch.float32)
        count = len(sample.leaves())
        together = results_and_gradients(ops.qk_norm_rotary, sample)[-count:]
        for i in range(count):
            leaves = sample.detached()
            for j, leaf in enumerate(leaves.leaves()):
                leaf.requires_grad_(i == j)
            generator = torch.Generator().manual_seed(1)
            results = leaves.run(ops.qk_norm_rotary)
            grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in results]
            alone = torch.autograd.grad(results, leaves.leaves()[i], grads)[0]
            torch.testing.assert_close(alone, together[i])


def test_second_derivatives_are_refused(device: torch.device) -> None:
    leaves = find(samples, FEW[0], device, torch.float32).detached()
    total = sum(y.square().sum() for y in leaves.run(ops.qk_norm_rotary))
    grad = torch.autograd.grad(total, leaves.leaves()[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="qk_norm_rotary_backward"):
        grad.sum().backward()


def test_inference_mode(device: torch.device) -> None:
    sample = find(samples, FEW[0], device, torch.float32)
    with torch.inference_mode():
        results = sample.run(ops.qk_norm_rotary)
    assert all(torch.equal(a, b) for a, b in zip(results, sample.run(ops.qk_norm_rotary), strict=True))


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
