"""The operations of Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170, section 2).

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways;
K: hidden width of the generator. Dtypes: float64, float32, bfloat16, float16. Products and sums are accumulated in
float32 (float64 for float64). The kernels are in ``csrc/ops``; here are only the Python signatures of
``torch.ops.muddformer.*``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muddformer import _library  # noqa: F401  (loads libmuddformer, which registers the operators)

__all__ = [
    "Deferral",
    "StreamNorms",
    "connection_weights",
    "connection_weights_chained",
    "defer_gradients",
    "depth_aggregate",
    "depth_aggregate_chained",
    "depth_aggregate_norm_chained",
    "depth_aggregation_step",
]


class Deferral(NamedTuple):
    """What one layer of a group is given, see :func:`defer_gradients`.

    Attributes:
        tickets: placeholders of no size in memory, whose gradients carry what the layer defers. Each is for one call.
        count: number of the layer's first hidden states whose gradients are deferred.
    """

    tickets: list[Tensor]
    count: int


@dataclasses.dataclass(frozen=True)
class StreamNorms:
    """The norms that the aggregation makes of its streams, see :func:`depth_aggregate_norm_chained`.

    Attributes:
        weights: weight [D] of every way's norm, None for a way without one.
        biases: bias [D] of every way's norm, or None for each; None: no bias at all.
        kind: ``"rms"`` (RMSNorm), ``"layer"`` (LayerNorm), or ``"none"`` where no way has a norm.
        eps: added to the mean square, or the variance.
        add_newest: whether the newest hidden state, as it came, is added to every way.
        pre_weight: weight [D] of the RMSNorm of the newest hidden state before it is mixed, or None.
        post_weight: weight [D] of the RMSNorm of the last way's sum, or None.
    """

    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None] | None = None
    kind: str = "rms"
    eps: float = 1e-6
    add_newest: bool = False
    pre_weight: Tensor | None = None
    post_weight: Tensor | None = None


def _check_list(hiddens: object) -> None:
    """The dispatcher has no clear word for a tensor in the place of a list of tensors."""
    if isinstance(hiddens, Tensor):
        raise TypeError(f"hiddens: expected a list of tensors, got one tensor of shape {list(hiddens.shape)}")


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
    _check_list(hiddens)
    return torch.ops.muddformer.depth_aggregate(hiddens, weights)


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
    """
    _check_list(hiddens)
    deferred = () if deferral is None else deferral
    streams, hiddens = torch.ops.muddformer.depth_aggregate_chained(hiddens, weights, *deferred)
    return streams, hiddens


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
        Every layer is to be called once. The hidden states that were given get their whole gradients; those which are
        returned, here and by the layers of the group, have only a part of theirs, as hooks would see.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_list(hiddens)
    for i, layer in enumerate(layers):
        if not (isinstance(layer, tuple) and [type(n) for n in layer] == [int, int]):
            raise TypeError(f"layers[{i}]: expected a tuple (C, S) of two integers, got {layer!r}")
    ways, sources = [c for c, _ in layers], [s for _, s in layers]
    handed_on, tickets = torch.ops.muddformer.defer_gradients(hiddens, ways, sources)
    deferrals, first = [], 0
    for count in ways:
        deferrals.append(Deferral(tickets[first : first + count + 1], len(hiddens)))
        first += count + 1
    return handed_on, deferrals


def depth_aggregate_norm_chained(
    hiddens: Sequence[Tensor],
    weights: Tensor,
    norm_weights: Sequence[Tensor | None] | StreamNorms,
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
    and handed on, as ``RMSNorm(hiddens[-1]) * pre_weight`` (PrePostDANorm: arXiv 2502.12170, Eq. 10). On CUDA (compute
    capability 9.0 or newer) the norms cost no pass of their own, forward or backward; sums are normed before they are
    rounded.

    Args:
        hiddens: as in :func:`depth_aggregate`.
        weights: as in :func:`depth_aggregate`.
        norm_weights: C weights [D]; None for a way without a norm. All weights and biases of norms are of one dtype,
            that of the hidden states or float32.
        norm_biases: C biases [D], or None for each; None: no bias at all.
        norm: ``"rms"`` (RMSNorm) or ``"layer"`` (LayerNorm).
        eps: added to the mean square, or the variance, at least 0.
        add_newest: whether ``hiddens[-1]``, as it came, is added to every way.
        pre_weight: weight [D] of the RMSNorm of ``hiddens[-1]`` before it is mixed; None: no norm.
        post_weight: weight [D] of the RMSNorm of the last way's sum, which then has no norm weight; needs
            ``add_newest``.
        deferral: this layer's of :func:`defer_gradients`, or None; with ``add_newest`` or ``pre_weight`` the newest
            hidden state cannot be deferred.

    Returns:
        ``(streams, hiddens)``, see :func:`depth_aggregate_chained`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_list(hiddens)
    if isinstance(norm_weights, StreamNorms):
        given = norm_weights
        norm_weights, norm_biases, norm, eps = given.weights, given.biases, given.kind, given.eps
        add_newest, pre_weight, post_weight = given.add_newest, given.pre_weight, given.post_weight
    biases = [None] * len(norm_weights) if norm_biases is None else norm_biases
    streams, hiddens = torch.ops.muddformer.depth_aggregate_norm_chained(
        hiddens,
        weights,
        norm_weights,
        biases,
        norm,
        eps,
        add_newest,
        pre_weight,
        post_weight,
        *(() if deferral is None else deferral),
    )
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


def depth_aggregation_step(
    hiddens: Sequence[Tensor],
    w1: Tensor | None,
    w2: Tensor | None,
    prior: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gelu_approximate: str = "none",
    cap: float | None = None,
    norm_weights: Sequence[Tensor | None] = (),
    norm_biases: Sequence[Tensor | None] = (),
    norm: str = "none",
    norm_eps: float = 1e-6,
) -> list[Tensor]:
    """A whole layer of connections for decoding: weights, aggregation and the norms of the streams, without gradients.

    ``A = GELU(RMSNorm(hiddens[-1]) w1^T) w2^T + prior`` (Eq. 6 to 8; without ``w1`` and ``w2``: ``A = prior``), then
    ``Y_c = norm_c(sum_j A[..., c, j, None] * hiddens[j])``. On CUDA (compute capability 9.0 and later) one kernel for
    up to 64 tokens, which a CUDA graph can capture; otherwise composed of :func:`connection_weights`,
    :func:`depth_aggregate` and PyTorch's norms.

    Args:
        hiddens: the S sources X_j, each [..., D], of one shape, dtype and device; the newest is the last.
        w1, w2, scale, eps, gelu_approximate, cap: see :func:`connection_weights`; both ``w1`` and ``w2`` None for a
            static layer.
        prior: static prior [C, S], of the dtype of the hidden states or float32.
        norm_weights: weight [D] of every stream's norm, None for a stream that stays as it is; or nothing at all. Of
            the dtype of the hidden states or float32.
        norm_biases: bias [D] or None for every stream, with ``norm="layer"``; or nothing at all.
        norm: ``"rms"``, ``"layer"``, or ``"none"`` where no stream is normed.
        norm_eps: added in the streams' norms, at least 0.

    Returns:
        The C streams, each [..., D], new tensors.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if gradients are enabled and an argument requires one.
    """
    return torch.ops.muddformer.depth_aggregation_step(
        hiddens,
        w1,
        w2,
        prior,
        scale,
        eps,
        gelu_approximate,
        cap,
        norm_weights,
        norm_biases,
        norm,
        norm_eps,
    )


@torch.compiler.assume_constant_result
def _has_bulk_copies(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 9


def fuses_norms(x: Tensor, sources: int, ways: int) -> bool:
    """Whether one kernel aggregates and norms hidden states like ``x``."""
    fits = x.is_cuda and x.dtype != torch.float64 and ways <= 4 and sources <= 64 and x.shape[-1] % 8 == 0
    return fits and _has_bulk_copies(x.device.index)


def fuses_step(newest: Tensor) -> bool:
    """Whether :func:`depth_aggregation_step` is meant for these tokens."""
    return newest.is_cuda and newest.numel() <= 64 * newest.shape[-1]
