"""Per-token connection weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import call

__all__ = ["connection_weights", "connection_weights_chained"]


def connection_weights(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    prior: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gelu_approximate: str = "none",
    cap: float | None = None,
) -> Tensor:
    """Per-token connection weights from the newest hidden state (arXiv 2502.12170, Eq. 6 to 8).

    ``A = GELU(RMSNorm(x) w1^T) w2^T + prior``, then ``cap * tanh(A / cap)`` if a cap is given.

    Args:
        x: newest hidden state [..., D].
        w1: [K, D], of the dtype of ``x``.
        w2: [C*S, K], of the dtype of ``x``; row c*S + j is source j of way c.
        prior: static prior [C, S], of the dtype of ``x`` or float32.
        scale: weight of the RMSNorm [D], of the dtype of ``x`` or float32; None for a norm without one.
        eps: added to the mean square inside the norm, at least 0.
        gelu_approximate: ``"none"`` (erf form) or ``"tanh"``.
        cap: positive bound of the weights, or None.

    Returns:
        Connection weights [..., C, S], of the dtype of ``x``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    op = torch.ops.muddformer.connection_weights.default
    return call(op, x, w1, w2, prior, scale, eps, gelu_approximate, cap)


def connection_weights_chained(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    prior: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gelu_approximate: str = "none",
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`connection_weights` that also hands ``x`` on: ``(weights, x)``.

    Later layers use the returned ``x``; the gradient which they accumulate joins the one of the weights in one pass.
    """
    op = torch.ops.muddformer.connection_weights_chained.default
    return call(op, x, w1, w2, prior, scale, eps, gelu_approximate, cap)
