"""A stack of blocks with MUDD connections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .connections import BlockHistory, Connections, Turn
from .norm import as_stream_norms
from .options import ConnectionOptions

__all__ = ["MUDDStack", "call_block"]


class MUDDStack(Connections):
    """Runs a list of blocks with MUDD connections, in place of a loop ``for block in blocks: x = block(x)``.

    After a block an aggregation mixes all hidden states so far into the streams of the next block; after the last block
    only the residual way is made, which is the result. A fresh stack computes what the blocks alone compute (but for a
    pre-norm without post-norm, and a cap of at most 1). Parameters are those of the blocks, ``layers.i.*``, and of
    :class:`Connections`.

    With ``multiway`` the blocks are called with four streams (xq, xk, xv, xr), each with its own aggregate, otherwise
    with one stream x; and with whatever else the stack is called with.

    With ``multiway`` a block may make the streams itself, inside its own forward: if its attribute ``pulls_streams`` is
    True, it is called as ``block(x, ..., history=history)`` with a :class:`BlockHistory`, and calls
    ``history.streams(x, norms)`` with the norms that it begins with. On CUDA these then cost no pass of their own.
    Where such a block is compiled by itself, it is called with ready streams and, if its attribute ``stream_norms``
    lists the norms, ``normed=True`` when they have passed them: a graph that made the streams would be another one for
    every number of sources.

    Args:
        layers: the blocks, as a list or ModuleList. Each returns one tensor of the shape of its input.
        dim: model width D.
        options: the options of the connections; None: the defaults.
        eps: added to the mean square in the norms.
        fields: single fields of :class:`ConnectionOptions`, in place of those in ``options``.

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
        options: ConnectionOptions | None = None,
        *,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ) -> None:
        if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList | nn.Sequential):
            raise TypeError(f"layers must be a list of modules, got one {type(layers).__name__}")
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers must be a list of modules, got a value of type {type(layers).__name__}")
        layers = list(layers)
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layers[{i}] must be a module, got a value of type {type(layer).__name__}")
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(layers)  # first, as in the public release
        self._make_connections(dim, len(self.layers), ConnectionOptions.of(options, fields), eps, device, dtype)
        self.gradient_checkpointing = False
        self.checkpoint_context_fn: Callable[[], Any] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the blocks.

        Args:
            x: X_0 [..., D], the embedding output.
            args, kwargs: passed on to every block.

        Returns:
            The residual way's aggregate after the last block [..., D] (before any final norm).

        Raises:
            TypeError: if x is no tensor, or a block returns anything but one.
            ValueError: if x has another width than dim (where anything is aggregated), or a block returns another shape
                than that of its input.
            RuntimeError: if a block changes its input in place, which the history still holds. Compiled code and
                tensors of inference mode do not show this: there the result is wrong.
        """
        history = self.begin(x)
        for layer in self.layers:
            history.advance(*self._checkpointed(call_block, layer, history.turn(), history.newest, args, kwargs))
        return history.result()

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        # The aggregation is computed again too: that is one read of the history, and the streams need not be kept.
        # Without it, torch.compile would also take every hidden state for something to compute again, block by block
        # from the first, because no checkpointed region reads it.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            options = {} if self.checkpoint_context_fn is None else {"context_fn": self.checkpoint_context_fn}
            return checkpoint(function, *args, use_reentrant=False, **options)
        return function(*args)


def call_block(
    block: nn.Module, turn: Turn, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """A block and the aggregation that makes its streams.

    Args:
        block: of one stream or of four; it may make them itself, see :class:`MUDDStack`. One that makes them in a
            compiled region, which must leave the history that it is given as it is, makes them by a
            :class:`BlockHistory` of its own and returns what this returns.
        turn: :meth:`History.turn` of the block.
        x: X_i [..., D], the newest hidden state.
        args, kwargs: what else the block is called with.

    Returns:
        What :meth:`History.advance` takes: X_(i+1), and the sources, handed on.
    """
    history = BlockHistory(turn)
    pulls = turn.copies > 1 and getattr(block, "pulls_streams", False)
    if pulls and _pulls_itself(block, x):
        given, kwargs = [x], {**kwargs, "history": history}
    elif pulls:
        norms = _whole_norms(block, x)
        given, kwargs = history.streams(x, norms), {**kwargs, "normed": norms is not None}
    else:
        given = history.streams(x)
    y = block(*given, *args, **kwargs)
    if history.hiddens is None:
        if isinstance(y, tuple) and len(y) == 2 and isinstance(y[1], list):
            return y
        raise RuntimeError(f"block {turn.index} has pulls_streams, but did not call history.streams()")
    history.check_unchanged()
    return y, history.hiddens


def _whole_norms(block: nn.Module, x: Tensor) -> Sequence[nn.Module | None] | None:
    """The norms of a block's streams, if the operators can take them now."""
    norms = getattr(block, "stream_norms", None)
    return norms if norms is not None and as_stream_norms(norms, x) is not None else None


def _compiled(block: nn.Module) -> nn.Module | None:
    """The module that torch.compile was called with, if a block, or what a wrapper holds, is compiled by itself."""
    while isinstance(block, nn.Module) and not torch.compiler.is_compiling():
        if block._compiled_call_impl is not None or "_orig_mod" in block._modules:
            return block
        names = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
        block = next((block._modules[name] for name in names if name in block._modules), None)
    return None


def _pulls_itself(block: nn.Module, x: Tensor) -> bool:
    """Whether a block that can make its streams is to do so.

    Not if it is compiled by itself, unless its norms are not there yet (FSDP2): then a hook makes the streams, after
    the one that gathers the weights and outside the compiled graph.
    """
    compiled = _compiled(block)
    if compiled is None:
        return True
    if getattr(block, "stream_norms", None) is None or _whole_norms(block, x) is not None:
        return False
    hook = _make_streams_hook()
    if hook not in compiled._forward_pre_hooks.values():
        compiled.register_forward_pre_hook(hook, with_kwargs=True)
    return True


@functools.cache
def _make_streams_hook() -> Callable[..., Any]:
    # Made at the first use, since torch.compiler.disable takes long to import what it needs.
    return torch.compiler.disable(_make_streams)


def _make_streams(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "history" not in kwargs:
        return None
    history, kwargs = kwargs["history"], {name: value for name, value in kwargs.items() if name != "history"}
    norms = _whole_norms(block, args[0])
    return (*history.streams(args[0], norms), *args[1:]), {**kwargs, "normed": norms is not None}
