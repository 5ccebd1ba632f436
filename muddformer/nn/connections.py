"""The connections of a stack of blocks, and the history of hidden states that a forward carries through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_integer
from .depth_aggregation import DepthAggregation
from .norm import RMSNorm, autocast_dtype, check_norms
from .options import WAYS, ConnectionOptions
from .plan import aggregation_plan, flush_groups

__all__ = ["BlockHistory", "Connections", "History"]


class Connections(nn.Module):
    """The connections of a stack of L blocks, without the blocks.

    :class:`muddformer.nn.MUDDStack` runs blocks with them; a loop of one's own does it by hand::

        history = connections.begin(x)
        for block in blocks:
            history.append(block(*history.streams()))
        y = history.result()

    Parameters have the names of the public release: ``dense_bs.n`` (priors), ``dynamic_dense.n.{w1,w2}.weight``, n
    counting the aggregations; PreDANorm adds ``source_norms.j.weight`` for hidden states that join without one.

    Args:
        dim: model width D.
        layers: number of blocks L.
        options: the options of the connections; None: the defaults.
        eps: added to the mean square in the norms.
        fields: single fields of :class:`ConnectionOptions`, in place of those in ``options``.

    Attributes:
        aggregation_class: the class of the aggregations, for a subclass to change: a subclass of
            :class:`DepthAggregation`.
        plan: which hidden states each aggregation mixes, see :func:`aggregation_plan`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    aggregation_class: type[DepthAggregation] = DepthAggregation

    def __init__(
        self,
        dim: int,
        layers: int,
        options: ConnectionOptions | None = None,
        *,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self._make_connections(dim, layers, ConnectionOptions.of(options, fields), eps, device, dtype)

    def _make_connections(
        self, dim: int, layers: int, options: ConnectionOptions, eps: float, device: Any, dtype: Any
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        self.dim = check_integer("dim", dim)
        self.num_blocks = check_integer("layers", layers, low=0)
        self.options = options
        self.plan: dict[int, tuple[int, ...]] = {}
        if options.dense:
            self.plan = aggregation_plan(
                layers,
                source_stride=options.source_stride,
                block_stride=options.block_stride,
                window=options.window,
                last="r" in options.ways,
            )
        self.dense_bs = nn.ParameterList()
        self.dynamic_dense = nn.ModuleList()
        for i, sources in self.plan.items():
            last = i == layers
            da = self.aggregation_class(
                dim,
                len(sources),
                options.ways if options.multiway and not last else 1,
                options=options,
                expand=4 if last and options.expand_last else 1,
                eps=eps,
                prior=False,
                **factory,
            )
            self.dynamic_dense.append(da)
            self.dense_bs.append(nn.Parameter(torch.empty(da.num_ways, da.sources, **factory)))
        # Where the aggregations are in dynamic_dense and dense_bs.
        self.places = {i: place for place, i in enumerate(self.plan)}
        num_ways = {i: da.num_ways for i, da in zip(self.plan, self.dynamic_dense, strict=True)}
        # By the first aggregation of a group: all of them, with their numbers of ways and sources.
        self.flush_groups = {
            group[0]: {i: (num_ways[i], len(self.plan[i])) for i in group}
            for group in flush_groups(self.plan, num_ways, options.flush_interval)
        }
        # Hidden states that are mixed later but are not the newest of any aggregation, which would norm them itself.
        joining = sorted({j for sources in self.plan.values() for j in sources} - self.plan.keys())
        make_norm = (lambda: RMSNorm(dim, eps, **factory)) if options.pre_norm else nn.Identity
        self.source_norms = nn.ModuleDict({str(j): make_norm() for j in joining})
        # Not self.reset_parameters(): a subclass may extend it to modules that it has yet to make.
        Connections.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Gives the connections their initial values, with which a stack computes what its blocks alone compute."""
        for da, prior in zip(self.dynamic_dense, self.dense_bs, strict=True):
            da.reset_parameters()
            da.reset_prior(prior)
        for norm in self.source_norms.values():
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()

    def connection_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the connections, which usually have no weight decay."""
        for module in (self.dense_bs, self.dynamic_dense, self.source_norms):
            yield from module.parameters()

    def begin(self, x: Tensor) -> History:
        """The history of a forward that begins with X_0.

        Args:
            x: X_0 [..., D], the embedding output.

        Raises:
            TypeError: if x is no tensor.
            ValueError: if x has another width than ``dim``, where anything is aggregated.
        """
        return History(self, x)

    def _defers(self, older: Sequence[Tensor]) -> bool:
        """Whether a group of aggregations defers the gradients of these hidden states."""
        if not older or not torch.is_grad_enabled() or torch.jit.is_tracing():
            return False
        if self.options.flush_interval is not None:
            return True
        if not older[0].is_cuda or older[0].shape[-1] % 8 != 0:
            return False
        return (self._autocast_dtype(older[0]) or older[0].dtype) in (torch.bfloat16, torch.float16)

    def _autocast_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype in which autocast keeps hidden states, None where it leaves them as they are."""
        return None if self.options.residual_dtype == "float32" else autocast_dtype(x)


class Turn(NamedTuple):
    """What one block's streams are made of, but for X_i itself, the newest hidden state.

    Attributes:
        index: number of the block from 0; the number of blocks for the result.
        aggregation: the one before the block, or None.
        older: the sources of the aggregation but X_i.
        prior, deferral: its other arguments.
        copies: streams that a block without aggregation gets, all X_i.
        wide: the aggregation runs without autocast.
        recording: gradients are recorded.
    """

    index: int
    aggregation: DepthAggregation | None
    older: list[Tensor]
    prior: Tensor | None
    deferral: ops.Deferral | None
    copies: int
    wide: bool
    recording: bool


class BlockHistory:
    """The history as one block has it: a block whose ``pulls_streams`` is True makes its streams of it.

    Inside its own forward the block's weights are whole, also when it is sharded, offloaded, wrapped or computed again
    for the backward. It calls :meth:`streams` once.

    Attributes:
        turn: what the streams are made of.
        hiddens: after :meth:`streams` the sources, handed on.
    """

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self._given: list[Tensor] = []
        self._versions: list[int] = []
        self.hiddens: list[Tensor] | None = None

    def streams(self, x: Tensor, norms: Sequence[nn.Module | None] | None = None) -> list[Tensor]:
        """The streams of the block.

        Args:
            x: X_i [..., D] as the block has been given it.
            norms: the norms of the streams, None for a stream that stays as it is; or None at all. On CUDA they cost
                no pass of their own.

        Returns:
            The streams, [..., D] each: (xq, xk, xv, xr) with ``multiway``, else one.

        Raises:
            RuntimeError: if they were made already, or are made without gradients in a forward that records them.
            TypeError, ValueError: for norms that are none, or a wrong number of them.
        """
        turn = self.turn
        if not torch.compiler.is_compiling():
            _check_turn(turn, again=self.hiddens is not None)
        if turn.aggregation is None:
            norms = check_norms("norms", norms, turn.copies)
            made = {norm: x if norm is None else norm(x) for norm in dict.fromkeys(norms)}  # each norm once
            streams = [made[norm] for norm in norms]
            self.hiddens = []
        else:
            with _autocast_off(x, turn.wide):
                streams, self.hiddens = turn.aggregation([*turn.older, x], turn.prior, norms, turn.deferral)
        self._given = [*streams, x]
        self._versions = _versions(self._given)
        return streams

    def check_unchanged(self) -> None:
        """Refuses what a block did that wrote into its streams or into X_i."""
        # None are known of streams that were made in a compiled graph, which may end before this.
        if self._versions and _versions(self._given) not in (self._versions, []):
            raise RuntimeError(
                f"block {self.turn.index} changes its input in place, but later blocks read this hidden state too: "
                "write x = x + f(x) instead of x += f(x)"
            )
        self._given, self._versions = [], []  # not kept for a checkpoint, which may keep this object


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place; not known of tensors of inference mode and while compiling."""
    return [] if torch.compiler.is_compiling() else [-1 if x.is_inference() else x._version for x in tensors]


def _check_turn(turn: Turn, again: bool) -> None:
    # When a checkpointed block is computed again, in a backward, it makes its streams again.
    if torch._C._current_graph_task_id() != -1:
        return
    if again:
        raise RuntimeError(f"the streams of block {turn.index} were made already: a block makes them once")
    if turn.recording and not torch.is_grad_enabled():
        raise RuntimeError(
            f"the streams of block {turn.index} are made without gradients, but the forward records them: later blocks "
            "could not pass gradients on to earlier ones. Checkpoint blocks with use_reentrant=False"
        )


def _autocast_off(x: Tensor, wide: bool) -> AbstractContextManager:
    """Where a history is wider than what autocast computes in."""
    return torch.autocast(x.device.type, enabled=False) if wide else nullcontext()


class History:
    """The hidden states of a forward on their way from block to block.

    For every block in turn: :meth:`streams`, then :meth:`append` of what it returns; after the last one :meth:`result`.
    Every call out of this order, and a second one, is an error that says what was to come.

    Attributes:
        newest: X_i, the hidden state that was appended last; X_0 at first.
        index: number of hidden states that were appended: the block whose turn it is, from 0.
    """

    def __init__(self, connections: Connections, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got a value of type {type(x).__name__}")
        if connections.plan and x.shape[-1:] != (connections.dim,):
            raise ValueError(f"x must have shape [..., dim] with dim={connections.dim}, got {list(x.shape)}")
        self._connections = connections
        self._older: dict[int, Tensor] = {}  # X_j by j, those that are mixed later
        self._deferrals: dict[int, ops.Deferral] = {}
        self._turn: Turn | None = None
        self._block: BlockHistory | None = None
        self._ended = False
        self.index = 0
        self.newest = self._held(x)
        self._join(0)

    def streams(self, norms: Sequence[nn.Module | None] | None = None) -> list[Tensor]:
        """The streams of the block whose turn it is, see :meth:`BlockHistory.streams`.

        Raises:
            RuntimeError: if they were made already, or all blocks had their turn.
        """
        if self.index == self._connections.num_blocks:
            self._check_open("streams()")
            raise RuntimeError(f"all {self.index} blocks had their turn: what follows is result()")
        if self._block is None:
            self._block = BlockHistory(self.turn())
        return self._block.streams(self.newest, norms)

    def append(self, x: Tensor) -> None:
        """Takes X_(i+1), what the block returned that was given the streams.

        Raises:
            TypeError: if x is no tensor.
            ValueError: if x has another shape than the hidden state before it.
            RuntimeError: if the streams were not made, all blocks had their turn, or the block wrote into its streams.
        """
        self._check_open("append()")
        if self._block is None or self._block.hiddens is None:
            raise RuntimeError(
                f"append() takes what block {self.index} made of its streams, but streams() was not called before"
            )
        self._block.check_unchanged()
        self.advance(x, self._block.hiddens)

    def result(self) -> Tensor:
        """The residual way's aggregate after the last block [..., D] (before any final norm); the history ends with it.

        Raises:
            RuntimeError: if a block has yet to have its turn, or the result was made already.
        """
        self._check_open("result()")
        if self.index < self._connections.num_blocks:
            raise RuntimeError(f"only {self.index} of {self._connections.num_blocks} blocks had their turn")
        y = BlockHistory(self.turn()).streams(self.newest)[-1]
        self._ended = True
        return y

    def turn(self) -> Turn:
        """What the streams of the block whose turn it is are made of; unchanged until the next one's turn."""
        if self._turn is not None:
            return self._turn
        i, connections = self.index, self._connections
        options = connections.options
        aggregation, older, prior, deferral, wide = None, [], None, None, False
        if i in connections.plan:
            place = connections.places[i]
            aggregation, prior = connections.dynamic_dense[place], connections.dense_bs[place]
            older = [self._older[j] for j in connections.plan[i][:-1]]
            wide = options.residual_dtype == "float32" and autocast_dtype(self.newest) is not None
            if i in connections.flush_groups and connections._defers(older):
                group = connections.flush_groups[i]
                with _autocast_off(self.newest, wide):
                    older, opened = ops.defer_gradients(older, list(group.values()))
                self._deferrals = dict(zip(group, opened, strict=True))
            deferral = self._deferrals.pop(i, None)  # to one block: nothing to watch, also in compiled blocks
            if deferral is not None:
                deferral.used = None
        copies = len(WAYS) if options.multiway and i < connections.num_blocks else 1
        self._turn = Turn(i, aggregation, older, prior, deferral, copies, wide, torch.is_grad_enabled())
        return self._turn

    def advance(self, x: Tensor, hiddens: list[Tensor]) -> None:
        """:meth:`append` for a block that had :meth:`turn`: ``hiddens`` are the sources that it handed on."""
        i = self.index
        if not isinstance(x, Tensor):
            raise TypeError(f"block {i} must return one tensor, got {type(x).__name__}")
        if x.shape != self.newest.shape:
            raise ValueError(
                f"block {i} must return the shape of its input {list(self.newest.shape)}, got {list(x.shape)}"
            )
        if hiddens:
            self._older = dict(zip(self._connections.plan[i], hiddens, strict=True))
        self.index, self.newest, self._turn, self._block = i + 1, self._held(x), None, None
        if i + 1 not in self._connections.plan:
            self._join(i + 1)

    def _held(self, x: Tensor) -> Tensor:
        """A hidden state in the dtype that ``residual_dtype`` asks for."""
        kept, dtype = self._connections.options.residual_dtype, autocast_dtype(x)
        if kept is None or dtype is None:
            return x
        if kept == "autocast":
            return x.to(dtype)
        return x.to(self._connections.dense_bs[0].dtype) if self._connections.plan else x

    def _join(self, i: int) -> None:
        """Keeps X_i, the newest, if an aggregation reads it that is not its own."""
        if str(i) in self._connections.source_norms:
            self._older[i] = self._connections.source_norms[str(i)](self.newest)

    def _check_open(self, call: str) -> None:
        if self._ended:
            raise RuntimeError(f"{call} comes after result(), with which a history ends: begin() another one")
