"""Weighted sums of hidden states over depth that are normed while they are made."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import call, check_kind, constant
from .defer_gradients import Deferral, check_deferral, end_deferral

__all__ = ["StreamNorms", "depth_aggregate_norm_chained", "fuses_norms"]


class StreamNorms(NamedTuple):
    """How the streams of C ways are normed, see :func:`depth_aggregate_norm_chained`.

    Attributes:
        weights: C weights [D], None for a way without a norm. All weights and biases of norms are of one dtype, that of
            the hidden states or float32.
        biases: C biases [D], or None for each; None: no bias at all.
        kind: ``"rms"`` (RMSNorm) or ``"layer"`` (LayerNorm); ``"none"`` where no way has a norm weight.
        eps: added to the mean square, or the variance, in every norm, at least 0.
        add_newest: whether the newest hidden state, as it came, is added to every way before its norm.
        pre_weight: weight [D] of the RMSNorm of the newest hidden state before it is mixed; None: no norm.
        post_weight: weight [D] of the RMSNorm of the last way's sum, which then has no norm weight, before the newest
            hidden state is added; needs ``add_newest``.
    """

    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None] | None = None
    kind: str = "rms"
    eps: float = 1e-6
    add_newest: bool = False
    pre_weight: Tensor | None = None
    post_weight: Tensor | None = None


def depth_aggregate_norm_chained(
    hiddens: Sequence[Tensor],
    weights: Tensor,
    norm_weights: StreamNorms | Sequence[Tensor | None],
    norm_biases: Sequence[Tensor | None] | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    add_newest: bool = False,
    pre_weight: Tensor | None = None,
    post_weight: Tensor | None = None,
    deferral: Deferral | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`depth_aggregate_chained` whose streams are normed, as the attention of the next block reads them.

    ``Y_c = norm_c(base + mix_c)`` with ``mix_c = sum_j weights[..., c, j, None] * hiddens[j]``; a way without a norm
    weight is ``base + mix_c``, and with a post weight the last way is ``base + RMSNorm(mix_c) * post_weight``. base is
    ``hiddens[-1]`` as it came with ``add_newest``, otherwise 0. With ``pre_weight`` the newest hidden state is mixed,
    and handed on, as ``RMSNorm(hiddens[-1]) * pre_weight`` (PrePostDANorm: arXiv 2502.12170, Eq. 10). On CUDA the norms
    cost no pass of their own, forward or backward, where :func:`fuses_norms` says so; sums are normed before they are
    rounded.

    Args:
        hiddens: as in :func:`depth_aggregate`.
        weights: as in :func:`depth_aggregate`.
        norm_weights: a :class:`StreamNorms`, or its weights; the arguments from here to ``post_weight`` are then its
            other fields (``norm`` is its kind).
        deferral: this layer's of :func:`defer_gradients`, or None; with ``add_newest`` or ``pre_weight`` the newest
            hidden state cannot be deferred.

    Returns:
        ``(streams, hiddens)``, see :func:`depth_aggregate_chained`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if a layer was called with the deferral before.
    """
    norms = norm_weights
    if not isinstance(norms, StreamNorms):
        norms = StreamNorms(norm_weights, norm_biases, norm, eps, add_newest, pre_weight, post_weight)
    elif (norm, eps, add_newest) != ("rms", 1e-6, False) or not norm_biases is pre_weight is post_weight is None:
        raise ValueError("norm_weights: expected no other argument of the norms beside a StreamNorms, got some")
    biases = norms.biases
    if biases is None:
        check_kind("norm_weights", norms.weights, "List[Optional[Tensor]]")
        biases = [None] * len(norms.weights)
    chained = torch.ops.muddformer.depth_aggregate_norm_chained
    results = call(
        chained.default if deferral is None else chained.deferred,
        hiddens,
        weights,
        norms.weights,
        biases,
        norms.kind,
        norms.eps,
        norms.add_newest,
        norms.pre_weight,
        norms.post_weight,
        *(() if deferral is None else check_deferral(deferral)),
    )
    if deferral is not None:
        end_deferral(deferral)
    return results


@constant
def _fuses_norms(device: torch.device, dtype: torch.dtype, width: int, sources: int, ways: int) -> bool:
    op = torch.ops.muddformer.fuses_norms.default
    return call(op, torch.empty(0, width, device=device, dtype=dtype), sources, ways)


def fuses_norms(x: Tensor, sources: int, ways: int) -> bool:
    """Whether one kernel makes the sums of :func:`depth_aggregate_norm_chained` and their norms.

    Where it does not (a CPU build, the CPU, float64, devices before compute capability 9.0 or without code for it in
    this build, sizes beyond the kernel's), the operator makes them of several steps in float32 and modules of their own
    are the better choice. A constant to ``torch.compile``.

    Args:
        x: a hidden state [..., D], of which device, dtype and D count. D has to be a multiple of 8 in every dtype:
            autocast may make float32 one of 16 bits.
        sources: number of hidden states S.
        ways: number of ways C.
    """
    if not (isinstance(x, Tensor) and type(sources) is type(ways) is int):
        for name, value, kind in (("x", x, "Tensor"), ("sources", sources, "int"), ("ways", ways, "int")):
            check_kind(name, value, kind)
    if x.dim() == 0:
        raise ValueError("x: expected shape [..., D], got []")
    return _fuses_norms(x.device, x.dtype, operator.index(x.shape[-1]), sources, ways)
