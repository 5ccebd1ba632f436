"""Weighted sums of hidden states over depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import call
from .defer_gradients import Deferral, check_deferral, end_deferral

__all__ = ["depth_aggregate", "depth_aggregate_chained"]


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
    return call(torch.ops.muddformer.depth_aggregate.default, hiddens, weights)


def depth_aggregate_chained(
    hiddens: Sequence[Tensor], weights: Tensor, deferral: Deferral | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`depth_aggregate` that also hands its sources on, so that gradients are chained instead of added.

    Args:
        hiddens: as in :func:`depth_aggregate`.
        weights: as in :func:`depth_aggregate`.
        deferral: this layer's of :func:`defer_gradients`, or None.

    Returns:
        ``(streams, hiddens)``: the C streams, and the S sources again, to be used in place of the ones given by
        everything that comes later. The backward then receives the gradient which later layers have already
        accumulated, and returns it plus its own term from one pass over the history.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if a layer was called with the deferral before.
    """
    chained = torch.ops.muddformer.depth_aggregate_chained
    if deferral is None:
        return call(chained.default, hiddens, weights)
    results = call(chained.deferred, hiddens, weights, *check_deferral(deferral))
    end_deferral(deferral)
    return results
