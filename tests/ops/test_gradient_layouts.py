"""Gradients that come in as autograd makes them, expanded, transposed or with gaps, count as contiguous copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.every_operator import inputs, outputs
from helpers.op_samples import DTYPES, relative_error, tolerance


def expanded(y: Tensor) -> Tensor:
    """As the backward of a sum gives it."""
    return torch.randn((), device=y.device).to(y.dtype).expand(y.shape)


def expanded_tokens(y: Tensor) -> Tensor:
    return torch.randn(y.shape[-1:], device=y.device).to(y.dtype).expand(y.shape)


def transposed(y: Tensor) -> Tensor:
    return torch.randn(y.shape[::-1], device=y.device).to(y.dtype).permute(*range(y.dim())[::-1])


def wide_rows(y: Tensor) -> Tensor:
    return torch.randn(*y.shape[:-1], y.shape[-1] + 8, device=y.device).to(y.dtype)[..., : y.shape[-1]]


def every_second(y: Tensor) -> Tensor:
    return torch.randn(*y.shape[:-1], 2 * y.shape[-1], device=y.device).to(y.dtype)[..., ::2]


def negated(y: Tensor) -> Tensor:
    """With the sign as a bit, as the imaginary part of a conjugate has it."""
    return torch._neg_view(torch.randn(y.shape, device=y.device).to(y.dtype))


@pytest.mark.parametrize("layout", [expanded, expanded_tokens, transposed, wide_rows, every_second, negated])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_of_incoming_gradients(
    layout: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    leaves = [t.requires_grad_() for t in inputs((3, 5), 32, dtype, device)]
    made = outputs(leaves)
    grads = [layout(y) if y.dim() else torch.ones_like(y) for y in made]
    results = torch.autograd.grad(made, leaves, grads, retain_graph=True)
    expected = torch.autograd.grad(made, leaves, [g.resolve_neg().contiguous() for g in grads])
    for result, like in zip(results, expected, strict=True):
        assert relative_error(result, like) <= tolerance(dtype)  # products of other layouts have another order
