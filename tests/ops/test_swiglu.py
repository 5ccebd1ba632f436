"""SwiGLU's product of gate and value."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from helpers.block_samples import cases, check, find, results_and_gradients
from helpers.block_samples import swiglu_samples as samples
from muddformer import ops, reference

OP = torch.ops.muddformer.swiglu.default
FEW = ["apart-4x64", "fused-5x272", "apart-0x8", "transposed"]


@pytest.mark.parametrize(("dtype", "name"), cases(samples))
def test_results_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    check(ops.swiglu, reference.swiglu, find(samples, name, device, dtype))


@pytest.mark.parametrize("name", ["apart-2x3x33", "fused-3x6"])
def test_gradcheck(name: str, device: torch.device) -> None:
    leaves = find(samples, name, device, torch.float64).detached()
    wanted = leaves.leaves()

    def call(*given: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(given)
        leaves.tensors = [t if t is None or not t.requires_grad else next(rest) for t in leaves.tensors]
        return tuple(leaves.run(ops.swiglu))

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
        first, second = (results_and_gradients(ops.swiglu, sample) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_inputs(device: torch.device) -> None:
    """Each gradient is the same when nothing else needs one."""
    for name in FEW:
        sample = find(samples, name, device, torch.float32)
        count = len(sample.leaves())
        together = results_and_gradients(ops.swiglu, sample)[-count:]
        for i in range(count):
            leaves = sample.detached()
            for j, leaf in enumerate(leaves.leaves()):
                leaf.requires_grad_(i == j)
            generator = torch.Generator().manual_seed(1)
            results = leaves.run(ops.swiglu)
            grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in results]
            alone = torch.autograd.grad(results, leaves.leaves()[i], grads)[0]
            torch.testing.assert_close(alone, together[i])


def test_second_derivatives_are_refused(device: torch.device) -> None:
    leaves = find(samples, FEW[0], device, torch.float32).detached()
    total = sum(y.square().sum() for y in leaves.run(ops.swiglu))
    grad = torch.autograd.grad(total, leaves.leaves()[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="swiglu_backward"):
        grad.sum().backward()


def test_inference_mode(device: torch.device) -> None:
    sample = find(samples, FEW[0], device, torch.float32)
    with torch.inference_mode():
        results = sample.run(ops.swiglu)
    assert all(torch.equal(a, b) for a, b in zip(results, sample.run(ops.swiglu), strict=True))


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
