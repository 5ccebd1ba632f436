"""A linear layer with its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import call

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """A linear layer with what belongs to it: ``x weight^T + bias + residual``.

    On CUDA the residual is added in the epilogue of the product, and the gradient of a float32 weight comes straight
    from operands of 16 bits, without having been rounded to 16 bits in between.

    Args:
        x: [..., in].
        weight: [out, in], of the dtype of ``x`` or float32: then it is cast for the product (under autocast once a
            forward, as autocast does it for all).
        bias: [out], likewise; None: none.
        residual: [..., out], of the dtype of ``x`` or float32; None: none. Its gradient is that of the result.

    Returns:
        [..., out], of the wider of the dtypes of ``x`` and ``residual``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return call(torch.ops.muddformer.linear.default, x, weight, bias, residual)
