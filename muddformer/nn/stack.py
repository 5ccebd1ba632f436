"""A stack of blocks with MUDD connections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from .._checks import check_integer
from .depth_aggregation import DepthAggregation
from .norm import RMSNorm, norm_kind
from .options import WAYS, check_flush_interval, check_ways
from .plan import aggregation_plan, flush_groups

__all__ = ["MUDDStack"]


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
