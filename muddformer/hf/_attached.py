"""The modules of a transformers model that has been given connections.

Nobody's code is copied: the own ``forward`` of a model, a decoder layer and an attention runs on a :class:`StandIn` of
the module, in which a few parts are others. The model's layers make their streams, a layer's input norm does nothing
because the streams have passed it, and the projections of an attention read a stream each::

    model.forward       runs on a stand-in whose  layers         are steps of a History
    layer.forward                                 input_layernorm passes the residual stream on
    attention.forward                             q_proj, k_proj, v_proj read their own streams

What an attention does with queries, keys and values (rotary positions, norms, caches, kernels) is its own affair. The
classes here are mixed into the modules' own (:func:`give_class`): names of modules and parameters stay.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import BlockHistory, Connections, History
from ..nn.norm import plain_parameters
from ..nn.stack import call_block

__all__ = ["AttachedAttention", "AttachedLayer", "AttachedModel", "Family", "StandIn", "give_class", "has_own_forward"]


class Family(NamedTuple):
    """What the parts of a family of models are called.

    Attributes:
        attention: a decoder layer's attention.
        projections: of queries, keys and values in an attention: three names, or one of a layer that makes all three.
        eps: of the norms, in the configuration.
        norm: of a decoder layer, before its attention.
    """

    attention: str
    projections: tuple[str, ...]
    eps: str
    norm: str = "input_layernorm"


class StandIn:
    """A module with some of its attributes replaced, for its own methods to run on.

    Whatever else is read of it is read of the module, and what is written to it is written there.
    """

    forward = None  # transformers compares a layer's forward with its own to see whether a subclass wraps it

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        for name, value in {**replaced, "_module": module}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class Mixin:
    """What classes that are mixed into a module's own class have in common.

    Attributes:
        mixin: the class that was mixed in.
        origin: the module's own class.
        family: what its parts are called.
        stand_in: the class of stand-ins for the module; it prints as the origin does, and transformers knows by that
            which outputs of a model it can record.
    """

    mixin: type[Mixin]
    origin: type[nn.Module]
    family: Family
    stand_in: type[StandIn]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class was made at run time: pickle and copy make it again.
        return _new, (self.mixin, self.origin, self.family), self.__dict__


class AttachedModel(Mixin):
    """Mixed into a base model (LlamaModel): its layers take their turns in a history of :attr:`connections`.

    Attributes:
        connections: :class:`muddformer.nn.Connections`, of as many blocks as there are layers.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passage = Passage(self.connections)
        steps = [Step(layer, passage) for layer in self.layers]
        return self.origin.forward(self.stand_in(self, layers=steps), *args, **kwargs)


class AttachedLayer(Mixin):
    """Mixed into a decoder layer, which becomes a block that makes its streams itself (``pulls_streams``).

    Without ``history`` and ``normed`` it is the layer that it was.
    """

    pulls_streams = True

    @property
    def stream_norms(self) -> list[nn.Module | None]:
        """The norms of the four streams (xq, xk, xv, xr); the residual stream has none."""
        return [getattr(self, self.family.norm)] * 3 + [None]

    def forward(
        self, *streams: Any, history: BlockHistory | None = None, normed: bool | None = None, **kwargs: Any
    ) -> Any:
        """What the layer returns, from one stream and the history, or from four streams."""
        if history is not None and torch.compiler.is_compiling() and self.gradient_checkpointing:
            # A checkpointed region of a graph must not write into the history.
            history = BlockHistory(history.turn)
            return self._of_streams(history.streams(streams[0], self.stream_norms), True, kwargs), history.hiddens
        if history is not None:
            streams, normed = history.streams(streams[0], self.stream_norms), True
        if normed is None:
            return self.origin.forward(self, *streams, **kwargs)
        return self._of_streams(streams, normed, kwargs)

    def _of_streams(self, streams: Sequence[Tensor], normed: bool, kwargs: dict[str, Any]) -> Any:
        *inputs, residual = streams
        if not normed:
            inputs = [norm(x) for norm, x in zip(self.stream_norms, inputs, strict=False)]
        name = self.family.attention
        attention = functools.partial(getattr(self, name), streams=inputs)
        replaced = {self.family.norm: _pass_on, name: attention}
        return self.origin.forward(self.stand_in(self, **replaced), residual, **kwargs)


class AttachedAttention(Mixin):
    """Mixed into an attention: with ``streams``, the normed (xq, xk, xv), its projections read those."""

    def forward(self, *args: Any, streams: Sequence[Tensor] | None = None, **kwargs: Any) -> Any:
        if streams is None:
            return self.origin.forward(self, *args, **kwargs)
        names = self.family.projections
        if len(names) == 1:
            heads = self.config.num_attention_heads
            replaced = {names[0]: functools.partial(_project_fused, getattr(self, names[0]), streams, heads)}
        else:
            replaced = {
                name: functools.partial(_project, getattr(self, name), x)
                for name, x in zip(names, streams, strict=True)
            }
        return self.origin.forward(self.stand_in(self, **replaced), *args, **kwargs)


class Passage:
    """One forward through all layers.

    Args:
        connections: those of the model.
    """

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.history: History | None = None

    def __call__(self, layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer with the aggregation before it, and after the last one the result.

        Args:
            x: what the model gives the layer: the embedding output, then what this returned the time before.

        Returns:
            What the layer returns, a hidden state or a tuple that begins with it.
        """
        if self.history is None:
            self.history = self.connections.begin(x)
        history = self.history
        y, hiddens = call_block(layer, history.turn(), history.newest, args, kwargs)
        y, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        history.advance(y, hiddens)
        y = history.result() if history.index == self.connections.num_blocks else history.newest
        return y if rest is None else (y, *rest)


class Step(StandIn):
    """A decoder layer in a passage: called as the layer is, it has its turn."""

    def __init__(self, layer: nn.Module, passage: Passage) -> None:
        super().__init__(layer, _passage=passage)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._passage(self._module, hidden_states, args, kwargs)


def give_class(module: nn.Module, mixin: type[Mixin], family: Family) -> None:
    """Makes a module one of its own class with ``mixin`` in front, of the same name."""
    module.__dict__.pop("forward", None)  # its own class's, see has_own_forward()
    module.__class__ = _mixed(mixin, type(module), family)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, which transformers may leave in a module that it has recorded."""
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


@functools.cache
def _mixed(mixin: type[Mixin], origin: type[nn.Module], family: Family) -> type[nn.Module]:
    # The name of the origin stays: transformers, accelerate and FSDP know layers by it.
    names = {"__module__": origin.__module__, "__qualname__": origin.__qualname__, "__doc__": origin.__doc__}
    stand_in = type(origin.__name__, (StandIn,), names)
    own = {"mixin": mixin, "origin": origin, "family": family, "stand_in": stand_in}
    return type(origin.__name__, (mixin, origin), {**names, **own})


def _new(mixin: type[Mixin], origin: type[nn.Module], family: Family) -> nn.Module:
    return object.__new__(_mixed(mixin, origin, family))


def _pass_on(x: Tensor) -> Tensor:
    return x


def _project(projection: nn.Module, stream: Tensor, hidden_states: Tensor) -> Tensor:
    """A projection of its own stream, whatever the attention gives it."""
    return projection(stream)


def _project_fused(projection: nn.Module, streams: Sequence[Tensor], heads: int, hidden_states: Tensor) -> Tensor:
    """What a projection to [queries, keys, values] of every head in turn makes of a stream each.

    Args:
        projection: from D to heads * 3 * E.
        streams: (xq, xk, xv), [..., D] each.
        hidden_states: what the attention gives it.

    Returns:
        [..., heads * 3 * E].
    """
    parameters = plain_parameters(projection, hidden_states, nn.Linear)
    if parameters is None:  # an adapter, a quantised layer: it makes all three of each stream
        parts = [projection(x).unflatten(-1, (heads, 3, -1))[..., way, :] for way, x in enumerate(streams)]
    else:
        weight, bias = (None if p is None else p.unflatten(0, (heads, 3, -1)) for p in parameters)
        parts = [
            F.linear(x, weight[:, way].flatten(0, 1), None if bias is None else bias[:, way].flatten())
            for way, x in enumerate(streams)
        ]
        parts = [part.unflatten(-1, (heads, -1)) for part in parts]
    return torch.stack(parts, -2).flatten(-3)
