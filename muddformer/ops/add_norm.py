"""Residual addition with the norm after it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import call, kind_of

__all__ = ["add_norm"]


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = residual + x`` and its norm in one pass; in the backward one pass for the gradient of both.

    Args:
        x: a branch [..., D], of the dtype of ``residual``, or of 16 bits beside a float32 one.
        residual: [..., D].
        weight: [D], of the dtype of ``residual`` or float32.
        bias: of a LayerNorm: [D], of the dtype of ``weight``.
        norm: ``"rms"`` (RMSNorm) or ``"layer"`` (LayerNorm).
        eps: added to the mean square or the variance, at least 0.
        dtype: of the normed tensor, that of ``x`` or of ``residual``. None: that of ``residual``, under autocast the
            autocast dtype, in which ``x`` is taken too; the sum keeps the dtype of ``residual``.

    Returns:
        (sum, normed), [..., D] each.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {kind_of(dtype)}")
    return call(torch.ops.muddformer.add_norm.default, x, residual, weight, bias, norm, eps, dtype)
