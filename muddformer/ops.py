"""The operations of Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170, section 2).

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways;
K: hidden width of the generator. Dtypes: float64, float32, bfloat16, float16. Products and sums are accumulated in
float32 (float64 for float64). The kernels are in ``csrc/ops``; here are only the Python signatures of
``torch.ops.muddformer.*``.

On the CPU, memory of freed results is kept for results of the same size, which saves the page faults of fresh memory.
The environment variable ``MUDDFORMER_CPU_CACHE_MIB``, read at the first use, is the most of it that is kept, in MiB
(256 where it is not set, at most 2^20; 0 keeps nothing). What is unused for five seconds goes back to the system.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muddformer import _library  # noqa: F401  (loads libmuddformer, which registers the operators)

from ._dispatch import call, check_kind, is_int64, kind_of

__all__ = [
    "Deferral",
    "StreamNorms",
    "add_norm",
    "connection_weights",
    "connection_weights_chained",
    "defer_gradients",
    "depth_aggregate",
    "depth_aggregate_chained",
    "depth_aggregate_norm_chained",
    "depth_aggregation_step",
    "fuses_norms",
    "fuses_step",
    "linear",
    "linear_cross_entropy",
    "qk_norm_rotary",
    "swiglu",
]


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


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers what a function answers, and makes that a constant to torch.compile.

    torch.compiler.assume_constant_result sets the same mark, but imports all of torch._dynamo to do it.
    """
    answers: dict[tuple[Any, ...], Any] = {}

    def remembered(*arguments: Any) -> Any:
        answer = answers.get(arguments)
        if answer is None:
            answer = answers[arguments] = function(*arguments)
        return answer

    remembered._dynamo_marked_constant = True
    return remembered


def _use(deferral: Deferral | None) -> tuple[Any, ...]:
    """The operators' arguments of a deferral that a layer is called with, and the end of its use."""
    if deferral is None:
        return ()
    if not isinstance(deferral, Deferral):
        raise TypeError(f"deferral: expected a Deferral of defer_gradients or None, got {kind_of(deferral)}")
    # A layer that is computed again in a backward, for a checkpoint, uses its deferral again.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if deferral.used is not None and torch.is_grad_enabled() and not again:
        if deferral.used:
            raise RuntimeError("deferral: expected one that no layer was called with before, got it a second time")
        deferral.used = True
    return deferral.tickets, deferral.count


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
    """
    chained = torch.ops.muddformer.depth_aggregate_chained
    if deferral is None:
        return call(chained.default, hiddens, weights)
    return call(chained.deferred, hiddens, weights, *_use(deferral))


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
        Every layer is to be called once: a second call with its deferral is an error. The hidden states that were given
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
    return call(
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
        *_use(deferral),
    )


@_constant
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
    return _fuses_norms(x.device, x.dtype, operator.index(x.shape[-1]), sources, ways)


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
    norms: StreamNorms | None = None,
    norm_weights: Sequence[Tensor | None] = (),
    norm_biases: Sequence[Tensor | None] = (),
    norm: str = "none",
    norm_eps: float = 1e-6,
) -> list[Tensor]:
    """A whole layer of connections for decoding: weights, aggregation and the norms of the streams, without gradients.

    ``A = GELU(RMSNorm(hiddens[-1]) w1^T) w2^T + prior`` (Eq. 6 to 8; without ``w1`` and ``w2``: ``A = prior``), then
    ``Y_c = norm_c(sum_j A[..., c, j, None] * hiddens[j])``. One kernel, which a CUDA graph can capture, where
    :func:`fuses_step` says so; otherwise composed of :func:`connection_weights`, :func:`depth_aggregate` and PyTorch's
    norms.

    Args:
        hiddens: the S sources X_j, each [..., D], of one shape, dtype and device; the newest is the last.
        w1, w2, scale, eps, gelu_approximate, cap: see :func:`connection_weights`; both ``w1`` and ``w2`` None for a
            static layer.
        prior: static prior [C, S], of the dtype of the hidden states or float32.
        norms: the streams' norms, without ``add_newest``, ``pre_weight`` and ``post_weight``; weights and biases may be
            empty. In place of the four arguments that follow, its ``weights``, ``biases``, ``kind`` and ``eps``.

    Returns:
        The C streams, each [..., D], new tensors.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if gradients are enabled and an argument requires one.
    """
    if norms is None:
        norms = StreamNorms(norm_weights, norm_biases, norm, norm_eps)
    elif not isinstance(norms, StreamNorms):
        raise TypeError(f"norms: expected a StreamNorms or None, got {kind_of(norms)}")
    extra = {"add_newest": norms.add_newest or None, "pre_weight": norms.pre_weight, "post_weight": norms.post_weight}
    given = [name for name, value in extra.items() if value is not None]
    if given:
        raise ValueError(f"norms: expected none of {', '.join(extra)} in a step, got {', '.join(given)}")
    return call(
        torch.ops.muddformer.depth_aggregation_step.default,
        hiddens,
        w1,
        w2,
        prior,
        scale,
        eps,
        gelu_approximate,
        cap,
        norms.weights,
        () if norms.biases is None else norms.biases,
        norms.kind,
        norms.eps,
    )


@_constant
def _step_tokens(device: torch.device, dtype: torch.dtype) -> int:
    return torch.ops.muddformer.step_tokens(torch.empty(0, 1, device=device, dtype=dtype))


def fuses_step(newest: Tensor) -> bool:
    """Whether :func:`depth_aggregation_step` is one kernel for tokens like these.

    It is on CUDA (compute capability 9.0 or newer, and code for it in this build), not of float64, for no more than 64
    tokens. Beyond that cuBLAS's products are the better choice, or there is no kernel.

    Args:
        newest: the newest hidden state [..., D].
    """
    if not isinstance(newest, Tensor):
        check_kind("newest", newest, "Tensor")
    most = _step_tokens(newest.device, newest.dtype)  # a constant to torch.compile: the number of tokens may be open
    return most > 0 and newest.numel() <= most * newest.shape[-1]


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
        [..., out], of the dtype of ``x``, or float32 beside a float32 residual.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return call(torch.ops.muddformer.linear.default, x, weight, bias, residual)


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


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``F.silu(gate) * up`` in one pass, and one in the backward, which makes ``silu(gate)`` again.

    Args:
        gate: [..., F]. Without ``up``: [..., 2 F], gate and up side by side; their gradient is one tensor too.
        up: of the shape, dtype and device of ``gate``.

    Returns:
        [..., F], in the dtype of the inputs, rounded once.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return call(torch.ops.muddformer.swiglu.default, gate, up)


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
    return call(torch.ops.muddformer.add_norm.default, x, residual, weight, bias, norm, eps, dtype)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of queries and keys, and its rotation by the position, in one pass each way.

    Entry i of a head pairs with entry i + half; the entries from 2 * half on pass through.

    Args:
        q: queries [B, T, H, E], as the projection leaves them; a slice of a wider one too.
        k: keys [B, T, Hk, E].
        cos, sin: of the T positions, float32 [T, half] or, where each sequence has positions of its own, [B, T, half],
            half <= E / 2. They get no gradients.
        q_weight, k_weight: of the norms, [E] each, of the dtype of ``q`` or float32; None, both of them: no norms.
        eps: added to the mean square, at least 0.

    Returns:
        Queries and keys of the shapes that came. Attention takes them as ``transpose(1, 2)``: its result has the order
        of its queries in memory, so that it can be flattened without a copy.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return call(torch.ops.muddformer.qk_norm_rotary.default, q, k, cos, sin, q_weight, k_weight, eps)
