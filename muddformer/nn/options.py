"""The options of connections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._checks import check_choice, check_flag, check_integer, check_real

__all__ = ["WAYS", "ConnectionOptions"]

WAYS = "qkvr"
_POST_NORMS = ("none", "residual", "all")
_GELU_FORMS = ("none", "tanh")
_RESIDUAL_DTYPES = ("autocast", "float32")
_LARGEST = 2**16


@dataclasses.dataclass(frozen=True)
class ConnectionOptions:
    """How hidden states are mixed (arXiv 2502.12170). Immutable; every field is checked when it is made.

    A stack, its layers of connections and a model's configuration have these options as they stand here.

    Args:
        dense: False: no connections at all; of the other fields ``multiway`` (of a stack), ``gelu_approximate`` (of a
            model) and ``residual_dtype`` still count.
        dynamic: connection weights depend on the token; False for the static prior alone.
        multiway: every way has its own aggregate; False: one aggregate feeds all streams.
        ways: with ``multiway``: the ways that are aggregated, a part of ``"qkvr"``; one left out takes the newest
            hidden state. Without ``"r"`` nothing is aggregated after the last block.
        source_stride: k of "k x p": every k-th hidden state is a source (with the first and the newest).
        block_stride: p of "k x p": an aggregation after every p-th block and after the last.
        window: only the newest ``window`` hidden states and the first are sources. None: all.
        pre_norm: PreDANorm: hidden states are normed once, when they join the history (Eq. 10).
        post_norm: PostDANorm: aggregates are added to the newest hidden state, after a norm of the residual way
            (``"residual"``, as the training code has it) or of every way (``"all"``, as the paper reads). ``"none"``:
            no norm and no addition.
        expand_last: the last generator has a hidden layer four times as wide.
        round64: hidden widths of the generators go up to the next multiple of 64 (an exact multiple too).
        cap: soft bound of the connection weights, ``cap * tanh(A / cap)``. None: no bound.
        gelu_approximate: ``"none"`` (erf form) or ``"tanh"``, in the generators and in a model's feed-forward networks.
        flush_interval: how a backward adds to the gradients of older hidden states: once in so many aggregations (1: in
            each). None: on CUDA in bfloat16 and float16 in groups that move the fewest bytes. Gradients differ by
            rounding alone.
        residual_dtype: dtype of the hidden states, and so of the residual stream, under autocast: ``"autocast"``, the
            one that autocast has, or ``"float32"``, that of the connections' parameters, with which the history takes
            twice the memory and its time. None: autocast's with connections, what the blocks get and return without.
            Outside autocast it has no effect.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    dense: bool = True
    dynamic: bool = True
    multiway: bool = False
    ways: str = WAYS
    source_stride: int = 1
    block_stride: int = 1
    window: int | None = None
    pre_norm: bool = False
    post_norm: str = "none"
    expand_last: bool = True
    round64: bool = True
    cap: float | None = None
    gelu_approximate: str = "none"
    flush_interval: int | None = None
    residual_dtype: str | None = None

    def __post_init__(self) -> None:
        check_choice("post_norm", self.post_norm, _POST_NORMS)
        check_choice("gelu_approximate", self.gelu_approximate, _GELU_FORMS)
        if self.residual_dtype is not None:
            check_choice("residual_dtype", self.residual_dtype, _RESIDUAL_DTYPES)
        for name in ("dense", "dynamic", "multiway", "pre_norm", "expand_last", "round64"):
            check_flag(name, getattr(self, name))
        for name in ("source_stride", "block_stride"):
            self._set(name, check_integer(name, getattr(self, name), _LARGEST))
        for name in ("window", "flush_interval"):
            if getattr(self, name) is not None:
                self._set(name, check_integer(name, getattr(self, name), _LARGEST))
        if self.cap is not None:
            self._set("cap", check_real("cap", self.cap))
        self._set("ways", check_ways("ways", self.ways))
        if self.dense and not self.multiway and self.ways != WAYS:
            raise ValueError(
                f"ways must be {WAYS!r} with multiway=False, got {self.ways!r}: all streams share one aggregate"
            )
        if self.window is not None and self.flush_interval not in (None, 1):
            raise ValueError(
                f"flush_interval must be None or 1 with a window, because the aggregations of a group have to share "
                f"their older hidden states, got flush_interval={self.flush_interval} and window={self.window}"
            )

    def check_keeps_outputs(self) -> None:
        """Refuses options with which fresh connections would change what a model computes.

        Raises:
            ValueError: for a pre-norm without post-norm, or a cap of at most 1.
        """
        if self.dense and self.pre_norm and self.post_norm == "none":
            raise ValueError(
                "post_norm must be 'residual' or 'all' with pre_norm=True, got 'none': fresh connections would at once "
                "change what the model computes"
            )
        if self.dense and self.cap is not None and self.cap <= 1:
            raise ValueError(
                f"cap must be more than 1, got {self.cap:g}: fresh connections would at once change what the model "
                "computes"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, options: ConnectionOptions | None, fields: Mapping[str, Any], **defaults: Any) -> ConnectionOptions:
        """The options that a module was given: whole, by single fields, or both.

        Args:
            options: the options as a whole, of this class or a subclass, or None.
            fields: single fields, which take the place of those in ``options``.
            defaults: fields of options that were not given as a whole, where they differ from the class's.

        Raises:
            TypeError, ValueError: for an unknown field or a wrong value.
        """
        if options is not None and not isinstance(options, ConnectionOptions):
            raise TypeError(f"options must be a ConnectionOptions, got {type(options).__name__}")
        names = [field.name for field in dataclasses.fields(ConnectionOptions)]
        if unknown := [name for name in fields if name not in names]:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: not a field of ConnectionOptions")
        values = defaults if options is None else {name: getattr(options, name) for name in names}
        return ConnectionOptions(**{**values, **fields})


def check_ways(name: str, ways: Any) -> str:
    """``ways`` in the order of ``"qkvr"``, after checking that it is a part of it, not empty, no letter twice."""
    if not isinstance(ways, str):
        raise TypeError(f"{name} must be a string, a part of {WAYS!r}, got {ways!r}")
    if not ways or set(ways) - set(WAYS) or len(set(ways)) != len(ways):
        raise ValueError(f"{name} must be a part of {WAYS!r}, not empty and no letter twice, got {ways!r}")
    return "".join(way for way in WAYS if way in ways)
