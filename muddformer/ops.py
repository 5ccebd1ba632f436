"""The two operations of Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170, section 2).

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways;
K: hidden width of the generator. Dtypes: float64, float32, bfloat16, float16. Products and sums are accumulated in
float32 (float64 for float64). The kernels are in ``csrc/ops``; here are only the Python signatures of
``torch.ops.muddformer.*``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muddformer import _library  # noqa: F401  (loads libmuddformer, which registers the operators)

__all__ = [
    "connection_weights",
    "connection_weights_chained",
    "depth_aggregate",
    "depth_aggregate_chained",
]


def depth_aggregate(hiddens: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Weighted sums of hidden states over depth: ``Y_c = sum_j weights[..., c, j, None] * hiddens[j]``.

    Args:
        hiddens: the S sources X_j, each [..., D], of one shape, dtype and device. The same tensor may stand twice.
        weights: connection weights [..., C, S], with the leading shape, dtype and device of the hidden states.

    Returns:
        The C streams Y_c, each [..., D], new tensors.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Gradients flow to every hidden state and to the weights. In a stack of layers prefer
    :func:`depth_aggregate_chained`: here autograd adds the S gradients of every layer one by one.
    """
    return torch.ops.muddformer.depth_aggregate(hiddens, weights)


def depth_aggregate_chained(hiddens: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`depth_aggregate` that also hands its sources on, so that gradients are chained instead of added.

    Args:
        hiddens: as in :func:`depth_aggregate`.
        weights: as in :func:`depth_aggregate`.

    Returns:
        ``(streams, hiddens)``: the C streams, and the S sources again, to be used in place of the ones given by
        everything that comes later. The backward then receives the gradient which later layers have already
        accumulated, and returns it plus its own term from one pass over the history.
    """
    streams, hiddens = torch.ops.muddformer.depth_aggregate_chained(hiddens, weights)
    return streams, hiddens


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
    return torch.ops.muddformer.connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap)


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
    return torch.ops.muddformer.connection_weights_chained(x, w1, w2, prior, scale, eps, gelu_approximate, cap)
