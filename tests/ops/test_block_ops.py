"""What the operators of a block's elementwise steps have in common; the rest of each is in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.library import opcheck

from helpers.block_samples import (
    add_norm_samples,
    cases,
    check,
    find,
    incoming,
    qk_samples,
    results_and_gradients,
    swiglu_samples,
)
from muddformer import ops, reference


class Operator(NamedTuple):
    """The samples of an operator, names of a few of them, and of small ones with odd sizes."""

    samples: Callable
    few: list[str]
    odd: list[str]


OPERATORS = {
    "add_norm": Operator(
        add_norm_samples, ["rms-5x64", "layer-5x64", "rms-0x8", "slices"], ["rms-3x7", "layer-3x7", "layer-no-bias"]
    ),
    "qk_norm_rotary": Operator(
        qk_samples,
        ["grouped", "no-norms", "slices", "own-positions", "no-tokens"],
        ["odd", "odd-no-norms", "own-positions"],
    ),
    "swiglu": Operator(
        swiglu_samples, ["apart-4x64", "fused-5x272", "apart-0x8", "transposed"], ["apart-2x3x33", "fused-3x6"]
    ),
}


@pytest.mark.parametrize(
    ("op", "dtype", "name"),
    [pytest.param(op, *case.values, id=f"{op}-{case.id}") for op in OPERATORS for case in cases(OPERATORS[op].samples)],
)
def test_results_and_gradients(op: str, name: str, device: torch.device, dtype: torch.dtype) -> None:
    check(getattr(ops, op), getattr(reference, op), find(OPERATORS[op].samples, name, device, dtype))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPERATORS for name in OPERATORS[op].odd])
def test_gradcheck(op: str, name: str, device: torch.device) -> None:
    leaves = find(OPERATORS[op].samples, name, device, torch.float64).detached()
    wanted = leaves.leaves()

    def call(*given: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(given)
        leaves.tensors = [t if t is None or not t.requires_grad else next(rest) for t in leaves.tensors]
        return tuple(leaves.run(getattr(ops, op)))

    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPERATORS for name in OPERATORS[op].few])
def test_opcheck(op: str, name: str, device: torch.device) -> None:
    leaves = find(OPERATORS[op].samples, name, device, torch.float32).detached()
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(getattr(torch.ops.muddformer, op).default, tuple(leaves.tensors), leaves.options, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_repeats_bit_for_bit(op: str, device: torch.device, dtype: torch.dtype) -> None:
    for name in OPERATORS[op].few:
        sample = find(OPERATORS[op].samples, name, device, dtype)
        first, second = (results_and_gradients(getattr(ops, op), sample) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_frozen_inputs(op: str, device: torch.device) -> None:
    """Each gradient is the same when nothing else needs one."""
    for name in OPERATORS[op].few:
        sample = find(OPERATORS[op].samples, name, device, torch.float32)
        count = len(sample.leaves())
        together = results_and_gradients(getattr(ops, op), sample)[-count:]
        for i in range(count):
            leaves = sample.detached()
            for j, leaf in enumerate(leaves.leaves()):
                leaf.requires_grad_(i == j)
            results = leaves.run(getattr(ops, op))
            alone = torch.autograd.grad(results, leaves.leaves()[i], incoming(results))[0]
            torch.testing.assert_close(alone, together[i])


@pytest.mark.parametrize("op", OPERATORS)
def test_second_derivatives_are_refused(op: str, device: torch.device) -> None:
    leaves = find(OPERATORS[op].samples, OPERATORS[op].few[0], device, torch.float32).detached()
    total = sum(y.square().sum() for y in leaves.run(getattr(ops, op)))
    grad = torch.autograd.grad(total, leaves.leaves()[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{op}_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("op", OPERATORS)
def test_inference_mode(op: str, device: torch.device) -> None:
    sample = find(OPERATORS[op].samples, OPERATORS[op].few[0], device, torch.float32)
    with torch.inference_mode():
        results = sample.run(getattr(ops, op))
    assert all(torch.equal(a, b) for a, b in zip(results, sample.run(getattr(ops, op)), strict=True))
