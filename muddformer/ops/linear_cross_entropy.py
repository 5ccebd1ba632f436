"""Head and loss of a language model together."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import call

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Head and loss of a language model together, without the logits of all tokens in memory.

    ``F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)`` for tokens in chunks, plus ``z_loss *
    logsumexp(logits) ** 2``. ``"mean"`` and ``"sum"`` make the gradients in the forward,
    while a chunk's logits are there, and keep them in float32; ``"none"`` computes the logits again in the backward.

    Args:
        hidden: hidden states [..., D].
        weight: the head [V, D], of the dtype of ``hidden`` or float32. A float32 one is cast for the products, and its
            gradient is never rounded to 16 bits.
        targets: classes [...], int64 or int32, from 0 to V - 1, or ``ignore_index``.
        bias: [V], of the dtype of ``hidden`` or float32; None for a head without one.
        reduction: ``"mean"`` over the tokens that count (0 if none does, with gradients of 0), ``"sum"``, or ``"none"``
            for the losses of all tokens [...].
        ignore_index: tokens of this target do not count: their loss and gradients are 0.
        label_smoothing: from 0 to 1, the part of the target's probability that all V classes share.
        z_loss: weight of the squared log-sum-exp of the logits, at least 0.
        chunk: tokens whose logits are in memory at once; None: so many that these take about 512 MiB (64 on a CPU).

    Returns:
        The loss, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        IndexError: for a target that is no class (on CUDA: a device-side assertion).
        NotImplementedError: in a backward with ``create_graph``: there is no second derivative.
    """
    op = torch.ops.muddformer.linear_cross_entropy.default
    return call(op, hidden, weight, targets, bias, reduction, ignore_index, label_smoothing, z_loss, chunk)
