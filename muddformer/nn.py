"""Modules that give a stack of blocks Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170).

:class:`DepthAggregation` is one layer of connections, :class:`MUDDStack` runs blocks with one after each of them.

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .config import WAYS, check_choice, check_flush_interval, check_integer, check_real, check_ways

__all__ = ["DepthAggregation", "MUDDStack", "RMSNorm"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension [D], in the dtype of ``x``.

    Unlike torch.nn.RMSNorm, a float32 weight meets a bfloat16 input (as under autocast) in the fused kernel.

    Args:
        dim: width D.
        eps: added to the mean square.
        init: value of a fresh weight.
    """

    def __init__(
        self, dim: int, eps: float = 1e-6, *, init: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ``init``."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


def norm_kind(norms: Iterable[nn.Module | None], x: Tensor) -> tuple[str, float] | None:
    """What the aggregation needs to know to norm its streams itself.

    Args:
        norms: None stands for a way without a norm.
        x: a hidden state [..., D].

    Returns:
        ``("rms" or "layer", eps)`` if the norms are all RMSNorm or all LayerNorm, without hooks, with weights [D] that
        are there (not sharded over devices) in the dtype of ``x`` or float32, and one eps. None for any others.
    """
    kinds = set()
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for norm in norms:
        if norm is None:
            continue
        weight = getattr(norm, "weight", None)
        if type(norm) not in (RMSNorm, nn.LayerNorm) or type(weight) not in (Tensor, nn.Parameter):
            return None
        if norm._forward_hooks or norm._forward_pre_hooks or weight.shape != x.shape[-1:]:
            return None
        if not autocast and weight.dtype not in (x.dtype, torch.float32):
            return None
        kinds.add(("rms" if type(norm) is RMSNorm else "layer", norm.eps, weight.dtype))
    return kinds.pop()[:2] if len(kinds) == 1 else None


@torch.compiler.assume_constant_result
def _has_bulk_copies(index: int) -> bool:
    """Whether a CUDA device has compute capability 9.0 or more."""
    return torch.cuda.get_device_capability(index)[0] >= 9


def _autocast_once(hiddens: Sequence[Tensor]) -> Sequence[Tensor]:
    """Hidden states in the dtype that autocast, if it is on, gives them in every operator.

    To hand these on is to cast each hidden state once.
    """
    kind = hiddens[-1].device.type
    if not torch.is_autocast_enabled(kind):
        return hiddens
    dtype = torch.get_autocast_dtype(kind)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in hiddens]


class DepthAggregation(nn.Module):
    """Depth-wise aggregation DA_i: mixes the hidden states of all layers so far, with weights made from the newest.

    ``A = GELU(RMSNorm(X_i) W1^T) W2^T + prior`` and ``Y_c = sum_j A[..., c, j] X_j`` (Eq. 5 to 8). A fresh
    layer passes X_i on: every Y_c is X_i.

    Args:
        dim: model width D.
        sources: number of hidden states S that are mixed, the newest last.
        ways: a part of ``"qkvr"``: four streams are returned, one left out being X_i itself. Or a number C: C streams
            are returned, the last one counting as the residual way.
        dynamic: False: the prior alone, the same for every token.
        expand: factor of the generator's hidden width K = C * S * expand.
        round64: K goes up to the next multiple of 64 (an exact multiple too).
        pre_norm: PreDANorm: X_i passes an RMSNorm before it is mixed (and the generator's norm has a weight). The other
            hidden states are expected as an earlier layer returned them.
        post_norm: PostDANorm: ``Y_c = X_i + sum_j ...`` with an RMSNorm of the sum of the residual way (``"residual"``)
            or of every way (``"all"``). ``"none"``: no norm and no addition.
        eps: added to the mean square in the norms.
        gelu_approximate: ``"none"`` (erf form) or ``"tanh"``.
        cap: soft bound of the weights, ``cap * tanh(A / cap)``. None: no bound.
        prior: False: the module has no prior of its own; every call gets one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        dim: int,
        sources: int,
        ways: str | int = WAYS,
        *,
        dynamic: bool = True,
        expand: int = 1,
        round64: bool = False,
        pre_norm: bool = False,
        post_norm: str = "none",
        eps: float = 1e-6,
        gelu_approximate: str = "none",
        cap: float | None = None,
        prior: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = check_integer("dim", dim)
        self.sources = check_integer("sources", sources)
        self.ways = check_integer("ways", ways) if isinstance(ways, int) else check_ways("ways", ways)
        self.num_ways = ways if isinstance(ways, int) else len(ways)
        self.eps = check_real("eps", eps, 0.0, 1.0)
        self.gelu_approximate = check_choice("gelu_approximate", gelu_approximate)
        self.cap = None if cap is None else check_real("cap", cap)
        self.prior = nn.Parameter(torch.empty(self.num_ways, self.sources, **factory)) if prior else None
        self.dynamic = dynamic
        self.norm = self.pre_norm = self.post_norms = None
        if dynamic:
            width = self.num_ways * self.sources * check_integer("expand", expand)
            width = (width // 64 + 1) * 64 if round64 else width
            self.w1 = nn.Linear(dim, width, bias=False, **factory)
            self.w2 = nn.Linear(width, self.num_ways * self.sources, bias=False, **factory)
            self.norm = RMSNorm(dim, eps, **factory) if pre_norm else None
        if pre_norm:
            self.pre_norm = RMSNorm(dim, eps, **factory)
        if check_choice("post_norm", post_norm) != "none":
            residual = self.num_ways - 1 if isinstance(ways, int) else self.ways.find("r")
            self.post_norms = nn.ModuleList(
                RMSNorm(dim, eps, init=1e-3, **factory) if post_norm == "all" or way == residual else nn.Identity()
                for way in range(self.num_ways)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Passes X_i on: W1 ~ Normal(variance 1/D), W2 = 0, prior one-hot on X_i (0 with ``post_norm``)."""
        if self.dynamic:
            nn.init.normal_(self.w1.weight, std=self.dim**-0.5)
            nn.init.zeros_(self.w2.weight)
        for norm in (self.norm, self.pre_norm, *(self.post_norms or ())):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()
        if self.prior is not None:
            self.reset_prior(self.prior)

    @torch.no_grad()
    def reset_prior(self, prior: Tensor) -> None:
        """Fills a prior [C, S] for this layer with its initial values, in place."""
        prior.zero_()
        if self.post_norms is None:
            # The bounded weight, not the prior, has to be one; a cap of at most 1 cannot reach it.
            one = torch.tensor(1.0, dtype=torch.float64)
            prior[:, -1] = self.cap * torch.atanh(one / self.cap).item() if self.cap and self.cap > 1 else 1.0

    def forward(
        self,
        hiddens: Sequence[Tensor],
        prior: Tensor | None = None,
        stream_norms: Sequence[nn.Module | None] | None = None,
        deferral: ops.Deferral | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mixes hidden states.

        Args:
            hiddens: the S sources, each [..., D], of one shape, dtype and device; the newest, X_i, is the last.
            prior: [C, S], in place of the module's own.
            stream_norms: norms of the streams that are returned, None for a stream that stays as it is. On CUDA they
                cost no pass of their own (:func:`muddformer.ops.depth_aggregate_norm_chained`).
            deferral: this layer's of :func:`muddformer.ops.defer_gradients`, or None.

        Returns:
            ``(streams, hiddens)``: the streams, each [..., D], and the sources to give to later layers in place of
            those that came (their gradients are chained, and with ``pre_norm`` the newest is now the normed one).

        Raises:
            ValueError: for a wrong number of sources or norms.
        """
        if len(hiddens) != self.sources:
            raise ValueError(f"hiddens must be {self.sources} tensors, got {len(hiddens)}")
        ways = self.ways if isinstance(self.ways, str) else None
        count = self.num_ways if ways is None else len(WAYS)
        norms = [None] * count if stream_norms is None else list(stream_norms)
        if len(norms) != count:
            raise ValueError(f"stream_norms must have {count} entries, got {len(norms)}")
        prior = self.prior if prior is None else prior
        if prior is None:
            raise ValueError("prior must be given to a DepthAggregation that was made with prior=False")
        way_norms = norms if ways is None else [norms[WAYS.index(way)] for way in ways]
        newest = hiddens[-1]
        if self._takes_one_step(newest, way_norms):
            hiddens = _autocast_once(hiddens)
            newest = hiddens[-1]
            mixed = self._step(hiddens, prior, way_norms)
        else:
            mixed, hiddens, newest = self._mix(hiddens, prior, way_norms, deferral)
        if ways is not None:
            by_way = dict(zip(ways, mixed, strict=True))
            left_out = [way for way in WAYS if way not in by_way]
            for way in left_out:
                norm = norms[WAYS.index(way)]
                by_way[way] = newest if norm is None else norm(newest)
            mixed = [by_way[way] for way in WAYS]
        return list(mixed), list(hiddens)

    def _mix(
        self,
        hiddens: Sequence[Tensor],
        prior: Tensor,
        norms: Sequence[nn.Module | None],
        deferral: ops.Deferral | None,
    ) -> tuple[list[Tensor], Sequence[Tensor], Tensor]:
        """The streams of the ways, the hidden states to be used from here on, and X_i likewise."""
        weights, newest = self._weights(hiddens[-1], prior)
        fused = self._fused_norms(norms, newest) if self._has_fused_kernel(newest) else None
        if fused is not None:
            hiddens = [*hiddens[:-1], newest]
            mixed, hiddens = ops.depth_aggregate_norm_chained(hiddens, weights, deferral=deferral, **fused)
            return mixed, hiddens, newest if self.pre_norm is not None else hiddens[-1]
        normed = newest if self.pre_norm is None else self.pre_norm(newest)
        mixed, hiddens = ops.depth_aggregate_chained([*hiddens[:-1], normed], weights, deferral)
        if self.pre_norm is None:
            newest = hiddens[-1]
        if self.post_norms is not None:
            mixed = [newest + norm(y) for norm, y in zip(self.post_norms, mixed, strict=True)]
        return [y if norm is None else norm(y) for norm, y in zip(norms, mixed, strict=True)], hiddens, newest

    def _has_fused_kernel(self, x: Tensor) -> bool:
        """Whether the aggregation's kernels can norm streams like x, see csrc/kernels/aggregate_norm.h."""
        fits = (
            x.is_cuda and x.dtype != torch.float64 and self.num_ways <= 4 and self.sources <= 64 and self.dim % 8 == 0
        )
        return fits and _has_bulk_copies(x.device.index)

    def _takes_one_step(self, newest: Tensor, norms: Sequence[nn.Module | None]) -> bool:
        """Whether this is decoding: a few tokens on CUDA, no gradients, and what one kernel can do."""
        if torch.is_grad_enabled() or not newest.is_cuda or self.pre_norm is not None or self.post_norms is not None:
            return False
        if torch.compiler.is_exporting():  # the number of tokens is to stay open
            return False
        return newest.numel() <= 64 * self.dim and (
            norm_kind(norms, newest) is not None or all(norm is None for norm in norms)
        )

    def _step(self, hiddens: Sequence[Tensor], prior: Tensor, norms: Sequence[nn.Module | None]) -> list[Tensor]:
        norm, norm_eps = norm_kind(norms, hiddens[-1]) or ("none", 0.0)
        return ops.depth_aggregation_step(
            hiddens,
            self.w1.weight if self.dynamic else None,
            self.w2.weight if self.dynamic else None,
            prior,
            eps=self.eps,
            gelu_approximate=self.gelu_approximate,
            cap=self.cap,
            norm_weights=[None if x is None else x.weight for x in norms],
            norm_biases=[getattr(x, "bias", None) for x in norms],
            norm=norm,
            norm_eps=norm_eps,
        )

    def _fused_norms(self, norms: Sequence[nn.Module | None], x: Tensor) -> dict[str, Any] | None:
        """Arguments of the aggregation that norms its streams itself; None where it cannot, or has no norm to make."""
        post = None
        if self.post_norms is not None:
            kept = [i for i, norm in enumerate(self.post_norms) if isinstance(norm, RMSNorm)]
            if any(i != self.num_ways - 1 or norms[i] is not None for i in kept):
                return None
            post = self.post_norms[-1] if kept else None
        kind = norm_kind(norms, x)
        if kind is None and any(norm is not None for norm in norms):
            return None
        norm, eps = kind or ("rms", self.eps)
        for own in (self.pre_norm, post):
            if own is not None and norm_kind([own], x) != ("rms", eps):
                return None
        if kind is None and self.pre_norm is None and self.post_norms is None:
            return None
        # The operator takes parameters of one dtype; autocast sees to that itself.
        parameters = [None if x is None else x.weight for x in norms], [getattr(x, "bias", None) for x in norms]
        pre_weight, post_weight = (None if own is None else own.weight for own in (self.pre_norm, post))
        dtypes = {p.dtype for p in (*parameters[0], *parameters[1], pre_weight, post_weight) if p is not None}
        if len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
            return None
        return {
            "norm_weights": parameters[0],
            "norm_biases": parameters[1],
            "norm": norm,
            "eps": eps,
            "add_newest": self.post_norms is not None,
            "pre_weight": pre_weight,
            "post_weight": post_weight,
        }

    def _weights(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Connection weights [..., C, S], and x to be used from here on."""
        if self.dynamic:
            return ops.connection_weights_chained(
                x,
                self.w1.weight,
                self.w2.weight,
                prior,
                scale=None if self.norm is None else self.norm.weight,
                eps=self.eps,
                gelu_approximate=self.gelu_approximate,
                cap=self.cap,
            )
        if self.cap is not None:
            prior = self.cap * torch.tanh(prior / self.cap)
        return prior.to(x.dtype).expand(*x.shape[:-1], *prior.shape), x

    def extra_repr(self) -> str:
        text = f"{self.dim}, sources={self.sources}, ways={self.ways!r}, dynamic={self.dynamic}, eps={self.eps:g}"
        text += f", gelu_approximate={self.gelu_approximate!r}" if self.dynamic else ""
        return text if self.cap is None else f"{text}, cap={self.cap:g}"


def aggregation_plan(
    layers: int, *, source_stride: int = 1, block_stride: int = 1, window: int | None = None, last: bool = True
) -> dict[int, tuple[int, ...]]:
    """Which hidden states X_j each aggregation DA_i mixes: ``{i: (j, ...)}``, i = 1 .. layers, j ascending up to i.

    Args:
        layers: number of blocks L.
        source_stride: k of "k x p": every k-th hidden state is a source, and always X_0 and X_i.
        block_stride: p of "k x p": an aggregation after every p-th block and after the last.
        window: of those, X_0 and the ones among the newest ``window`` hidden states. None: all.
        last: False: none after the last block.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_integer("source_stride", source_stride)
    check_integer("block_stride", block_stride)
    if window is not None:
        check_integer("window", window)
    oldest = {i: 0 if window is None else i - window + 1 for i in range(1, layers + 1)}
    return {
        i: tuple(j for j in range(i + 1) if j in (0, i) or (j % source_stride == 0 and j >= oldest[i]))
        for i in range(1, layers + 1)
        if (last if i == layers else i % block_stride == 0)
    }


def flush_groups(
    plan: Mapping[int, Sequence[int]], ways: Mapping[int, int], interval: int | None = None
) -> list[list[int]]:
    """Which aggregations add to the gradients of older hidden states together (:func:`muddformer.ops.defer_gradients`).

    Args:
        plan: the sources of each aggregation, see :func:`aggregation_plan`.
        ways: number of ways C of each aggregation.
        interval: aggregations of a group, counted from the last one. None: the groups that move the fewest bytes, of at
            most 16 ways, what one pass of the CUDA kernel adds up.

    Returns:
        Groups of two or more successive aggregations, in order. The older hidden states of a group are the sources of
        its first aggregation but the newest.
    """
    order = list(plan)
    if interval is not None:
        check_integer("interval", interval)
        groups = [order[max(0, end - interval) : end] for end in range(len(order), 0, -interval)]
        return [group for group in reversed(groups) if len(group) > 1]
    best: list[tuple[int, list[list[int]]]] = [(0, [])]  # for the first 0, 1, .. aggregations: units saved, groups
    for end in range(1, len(order) + 1):
        choice = best[end - 1]
        for begin in range(end - 1):
            group = order[begin:end]
            old = plan[group[0]][:-1]
            if sum(ways[i] for i in group) > 16 or any(plan[i][: len(old)] != old for i in group):
                continue
            # A unit is one pass over a [tokens, D]: each dX_j is read and written once instead of len(group) times, and
            # of every aggregation the gradients of its sums are read, and all but the residual way's are written.
            saved = 2 * len(old) * (len(group) - 1) - sum(2 * ways[i] - 1 for i in group)
            if saved > 0 and best[begin][0] + saved > choice[0]:
                choice = (best[begin][0] + saved, [*best[begin][1], group])
        best.append(choice)
    return best[-1][1]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place; not known of tensors of inference mode and while compiling."""
    return [] if torch.compiler.is_compiling() else [-1 if x.is_inference() else x._version for x in tensors]


class _Mix(NamedTuple):
    """The aggregation before a block, and its arguments but for X_i, which comes last among the sources."""

    aggregation: DepthAggregation
    older: list[Tensor]
    prior: Tensor
    stream_norms: list[nn.Module | None] | None
    deferral: ops.Deferral | None


class MUDDStack(nn.Module):
    """Runs a list of blocks with MUDD connections, in place of a loop ``for block in blocks: x = block(x)``.

    After a block an aggregation mixes all hidden states so far into the streams of the next block; after the last block
    only the residual way is made, which is the result. A fresh stack computes what the blocks alone compute (but for a
    pre-norm without post-norm, and a cap of at most 1). Parameters
    have the names of the public release: ``layers.i.*``, ``dense_bs.n`` (priors), ``dynamic_dense.n.{w1,w2}.weight``, n
    counting the aggregations; PreDANorm adds ``source_norms.j.weight`` for hidden states that join without one.

    Args:
        layers: the blocks, as a list or ModuleList. Each returns one tensor of the shape of its input. With
            ``multiway`` a block may name the norms with which it begins, as ``stream_norms``, a list of four RMSNorm or
            LayerNorm modules or None; then it is called with streams that have passed them and ``normed=True``.
        dim: model width D.
        multiway: the blocks are called with four streams (xq, xk, xv, xr), each with its own aggregate. False: they are
            called with one stream x.
        dense: False: no connections at all.
        ways: with ``multiway``: the ways that are aggregated, a part of ``"qkvr"``; one left out takes the newest
            hidden state. Without ``"r"`` nothing is aggregated after the last block.
        source_stride, block_stride, window: which hidden states are mixed where, see :func:`aggregation_plan`.
        expand_last: the last generator has a hidden layer four times as wide.
        dynamic, round64, pre_norm, post_norm, eps, gelu_approximate, cap: see :class:`DepthAggregation`.
        flush_interval: aggregations that add to the gradients of older hidden states together, see
            :func:`flush_groups`. None: on CUDA in bfloat16 and float16 the groups that move the fewest bytes; 1: none.

    Attributes:
        gradient_checkpointing: set it to True to recompute every block, with the aggregation before it, in the backward
            of a training step instead of keeping its activations (torch.utils.checkpoint; the history of hidden states
            is kept).
        checkpoint_context_fn: with ``gradient_checkpointing``: what torch.utils.checkpoint takes as ``context_fn``, for
            selective checkpointing (torch.utils.checkpoint.create_selective_checkpoint_contexts). None: keep nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        dim: int,
        *,
        multiway: bool = False,
        dense: bool = True,
        ways: str = WAYS,
        dynamic: bool = True,
        source_stride: int = 1,
        block_stride: int = 1,
        window: int | None = None,
        pre_norm: bool = False,
        post_norm: str = "none",
        expand_last: bool = True,
        round64: bool = True,
        eps: float = 1e-6,
        gelu_approximate: str = "none",
        cap: float | None = None,
        flush_interval: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList | nn.Sequential):
            raise TypeError(f"layers must be a list of modules, got one {type(layers).__name__}")
        self.layers = nn.ModuleList(layers)
        self.dim = check_integer("dim", dim)
        self.multiway = multiway
        self.gradient_checkpointing = False
        self.checkpoint_context_fn: Callable[[], Any] | None = None
        ways = check_ways("ways", ways)
        if dense and not multiway and ways != WAYS:
            raise ValueError(f"ways must be {WAYS!r} with multiway=False, got {ways!r}")
        self.plan = {}
        if dense:
            self.plan = aggregation_plan(
                len(self.layers),
                source_stride=source_stride,
                block_stride=block_stride,
                window=window,
                last="r" in ways,
            )
        self.flush_interval = None if flush_interval is None else check_integer("flush_interval", flush_interval, 2**16)
        check_flush_interval(flush_interval, window)
        self.dense_bs = nn.ParameterList()
        self.dynamic_dense = nn.ModuleList()
        for i, sources in self.plan.items():
            last = i == len(self.layers)
            da = DepthAggregation(
                dim,
                len(sources),
                ways if multiway and not last else 1,
                dynamic=dynamic,
                expand=4 if last and expand_last else 1,
                round64=round64,
                pre_norm=pre_norm,
                post_norm=post_norm,
                eps=eps,
                gelu_approximate=gelu_approximate,
                cap=cap,
                prior=False,
                device=device,
                dtype=dtype,
            )
            self.dynamic_dense.append(da)
            self.dense_bs.append(nn.Parameter(torch.empty(da.num_ways, da.sources, device=device, dtype=dtype)))
        num_ways = {i: da.num_ways for i, da in zip(self.plan, self.dynamic_dense, strict=True)}
        shapes = {i: (num_ways[i], len(sources)) for i, sources in self.plan.items()}
        # By the first aggregation of a group: all of them, with their numbers of ways and sources.
        self.flush_groups = {
            group[0]: {i: shapes[i] for i in group} for group in flush_groups(self.plan, num_ways, self.flush_interval)
        }
        # Hidden states that are mixed later but are not the newest of any aggregation, which would norm them itself.
        joining = sorted({j for sources in self.plan.values() for j in sources} - self.plan.keys())
        make_norm = (lambda: RMSNorm(dim, eps, device=device, dtype=dtype)) if pre_norm else nn.Identity
        self.source_norms = nn.ModuleDict({str(j): make_norm() for j in joining})
        # Not self.reset_parameters(): a subclass may extend it to modules that it has yet to make.
        MUDDStack.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Gives the connections their initial values, with which the stack computes what its blocks alone compute."""
        for da, prior in zip(self.dynamic_dense, self.dense_bs, strict=True):
            da.reset_parameters()
            da.reset_prior(prior)
        for norm in self.source_norms.values():
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()

    def connection_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the connections, which usually have no weight decay; all others belong to the blocks."""
        for module in (self.dense_bs, self.dynamic_dense, self.source_norms):
            yield from module.parameters()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the blocks.

        Args:
            x: X_0 [..., D], the embedding output.
            args, kwargs: passed on to every block.

        Returns:
            The residual way's aggregate after the last block [..., D] (before any final norm).

        Raises:
            TypeError: if a block returns anything but a tensor.
            ValueError: if x has another width than dim, or a block returns another shape than that of its input.
            RuntimeError: if a block changes its input in place, which the history still holds.
        """
        if x.shape[-1:] != (self.dim,) and self.plan:
            raise ValueError(f"x must have shape [..., dim] with dim={self.dim}, got {list(x.shape)}")
        history: dict[int, Tensor] = {}
        aggregations = iter(zip(self.plan.values(), self.dynamic_dense, self.dense_bs, strict=True))
        deferrals: dict[int, ops.Deferral] = {}
        mix: _Mix | None = None  # before the next block
        self._join(history, 0, x)
        for i, layer in enumerate(self.layers):
            x, hiddens = self._checkpointed(self._block, i, layer, mix, x, args, kwargs)
            if mix is not None:
                history = dict(zip(self.plan[i], hiddens, strict=True))
            mix = None
            if i + 1 not in self.plan:
                self._join(history, i + 1, x)
                continue
            sources, da, prior = next(aggregations)
            older = [history[j] for j in sources[:-1]]
            if i + 1 in self.flush_groups and self._defers(older):
                older, opened = ops.defer_gradients(older, list(self.flush_groups[i + 1].values()))
                deferrals = dict(zip(self.flush_groups[i + 1], opened, strict=True))
            mix = _Mix(da, older, prior, self._stream_norms(i + 1, x), deferrals.pop(i + 1, None))
        return self._streams(mix, x)[0][-1]

    @staticmethod
    def _streams(mix: _Mix | None, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The streams made of X_i and earlier hidden states, and these, handed on."""
        if mix is None:
            return [x], []
        return mix.aggregation([*mix.older, x], mix.prior, mix.stream_norms, mix.deferral)

    def _block(
        self,
        i: int,
        layer: nn.Module,
        mix: _Mix | None,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, list[Tensor]]:
        """Block i, from 0, and the aggregation that makes its streams: X_(i+1), and the sources, handed on."""
        streams, hiddens = self._streams(mix, x)
        if mix is not None and mix.stream_norms is not None:
            kwargs = {**kwargs, "normed": True}
        if self.multiway and len(streams) == 1:
            streams = streams * len(WAYS)
        versions = _versions(streams)
        y = layer(*streams, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(f"block {i} must return one tensor, got {type(y).__name__}")
        if y.shape != x.shape:
            raise ValueError(f"block {i} must return the shape of its input {list(x.shape)}, got {list(y.shape)}")
        if _versions(streams) != versions:
            raise RuntimeError(
                f"block {i} changes its input in place, but later blocks read this hidden state too: "
                "write x = x + f(x) instead of x += f(x)"
            )
        return y, hiddens

    def _defers(self, older: Sequence[Tensor]) -> bool:
        """Whether a group of aggregations defers the gradients of these hidden states."""
        if not older or not torch.is_grad_enabled():
            return False
        if self.flush_interval is not None or not older[0].is_cuda or older[0].shape[-1] % 8 != 0:
            return self.flush_interval is not None
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else older[0].dtype
        return dtype in (torch.bfloat16, torch.float16)

    def _stream_norms(self, i: int, x: Tensor) -> list[nn.Module | None] | None:
        """The norms of the streams of block i, from 0, if the aggregation before it can take them over."""
        if not self.multiway or i == len(self.layers):
            return None
        layer = self.layers[i]
        # FSDP, offloading and hooks make a block's parameters its own business.
        if layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__:
            return None
        norms = getattr(layer, "stream_norms", None)
        return norms if norms is not None and norm_kind(norms, x) is not None else None

    def _join(self, history: dict[int, Tensor], i: int, x: Tensor) -> None:
        """Adds X_i to the history if any aggregation reads it."""
        if str(i) in self.source_norms:
            history[i] = self.source_norms[str(i)](x)

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        # The aggregation is computed again too: that is one read of the history, and the streams need not be kept.
        # Without it, torch.compile would also take every hidden state for something to compute again, block by block
        # from the first, because no checkpointed region reads it.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            options = {} if self.checkpoint_context_fn is None else {"context_fn": self.checkpoint_context_fn}
            return checkpoint(function, *args, use_reentrant=False, **options)
        return function(*args)
