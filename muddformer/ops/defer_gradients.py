"""Groups of layers that add to the gradients of older hidden states in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import call, is_int64, kind_of

__all__ = ["Deferral", "check_deferral", "defer_gradients", "end_deferral"]


@dataclasses.dataclass(eq=False)
class Deferral:
    """What one layer of a group is given, and one call of it, see :func:`defer_gradients`.

    Attributes:
        tickets: placeholders of no size in memory, whose gradients carry what the layer defers.
        count: number of the layer's first hidden states whose gradients are deferred.
        used: whether a layer was called with it; None where whoever holds it sees to that. Compiled code knows the
            second use by this alone, other code by the tickets too.
    """

    tickets: list[Tensor]
    count: int
    used: bool | None = None


def defer_gradients(
    hiddens: Sequence[Tensor], layers: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Deferral]]:
    """Opens a group of layers that add to the gradients of older hidden states in one pass, at its end.

    ``dX_j = G_j + sum_i sum_c weights_i[..., c, j] * dV_{i,c}`` over the layers i of the group and their ways c, dV
    being the gradient of a way's sum over its sources. Without a group each layer's backward reads and writes every
    dX_j. The gradients are the same but for rounding, which happens once a group (of at most 16 ways). It pays on CUDA
    in bfloat16 and float16 where ``2 len(hiddens) (len(layers) - 1)`` is more than the sum of 2 C - 1 over the layers.

    Args:
        hiddens: the older hidden states [..., D], which all layers of the group mix first, in this order.
        layers: ``(C, S)``, the number of ways and of sources, of each layer.

    Returns:
        ``(hiddens, deferrals)``: the hidden states to be used from here on, and for each layer what it is called with.
        Every layer is to be called once: a second call with its deferral is an error, as is a call with hidden states
        that require gradients where those given here required none. The hidden states that were given
        get their whole gradients; those which are returned, here and by the layers of the group, have only a part of
        theirs, as hooks would see.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if isinstance(layers, Tensor | str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a list of tuples (C, S), got {kind_of(layers)}")
    for i, layer in enumerate(layers):
        if not (isinstance(layer, tuple) and [type(n) for n in layer] == [int, int]):
            raise TypeError(f"layers[{i}]: expected a tuple (C, S) of two integers, got {kind_of(layer)}")
        if not all(map(is_int64, layer)):
            raise ValueError(f"layers[{i}]: expected two integers of 64 bits, got a larger one")
    ways, sources = [c for c, _ in layers], [s for _, s in layers]
    handed_on, tickets = call(torch.ops.muddformer.defer_gradients.default, hiddens, ways, sources)
    deferrals, first = [], 0
    for count in ways:
        deferrals.append(Deferral(tickets[first : first + count + 1], len(hiddens), used=False))
        first += count + 1
    return handed_on, deferrals


def check_deferral(deferral: Deferral) -> tuple[Any, ...]:
    """The operators' arguments of a deferral that a layer is called with.

    Raises:
        TypeError: if it is none.
        RuntimeError: if a layer was called with it before.
    """
    if not isinstance(deferral, Deferral):
        raise TypeError(f"deferral: expected a Deferral of defer_gradients or None, got {kind_of(deferral)}")
    if deferral.used and _counts():
        raise RuntimeError("deferral: expected one that no layer was called with before, got it a second time")
    return deferral.tickets, deferral.count


def end_deferral(deferral: Deferral) -> None:
    """Says that a layer was called with a deferral; a call that failed did not use it."""
    if deferral.used is not None and _counts():
        deferral.used = True


def _counts() -> bool:
    # A layer that is computed again in a backward, for a checkpoint, uses its deferral again.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    return torch.is_grad_enabled() and not again
