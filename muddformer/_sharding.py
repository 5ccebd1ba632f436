"""How the operators run on tensors that are spread over processes (torch.distributed.tensor.DTensor).

Tokens are independent of each other: every process computes those that it has, and nothing is sent. Parameters are
whole on every process; their gradients, sums over all tokens, are added up over the processes that share the tokens.
torch.distributed.tensor takes long to import, so the rules are registered when somebody else has imported it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library  # noqa: F401  (loads libmuddformer, which registers the operators)
from ._imports import when_imported

__all__: list[str] = []


class Rule(NamedTuple):
    """How one operator is spread over processes. All its tensor arguments but ``whole`` and ``local`` are of tokens.

    Attributes:
        tokens: the argument [..., D], or the list of such, whose leading dimensions are the tokens.
        whole: arguments that every process has all of: parameters.
        local: arguments and results that stay what one process made for its own tokens.
        results: what the results are: the argument that each is the gradient of, a name in ``local``, or None for one
            of tokens; empty: all are of tokens.
        plain: whether parameters may be plain tensors, which count as replicated.
        alike: parameters that are DTensors all or none: the backward is given the first alone.
    """

    tokens: str
    whole: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    results: tuple[str | None, ...] = ()
    plain: bool = True
    alike: tuple[str, ...] = ()


_GENERATOR = ("w1", "w2", "prior", "scale")
_NORMS = ("norm_weights", "norm_biases", "pre_weight", "post_weight")

RULES = {
    "add_norm_backward": Rule("sum", ("weight",), ("rstd", "mean"), ("sum", None, "weight", "weight")),
    "add_norm_forward": Rule(
        "residual", ("weight", "bias"), ("rstd", "mean"), (None, None, "rstd", "mean"), alike=("weight", "bias")
    ),
    "connection_weights": Rule("x", _GENERATOR),
    "connection_weights_forward": Rule("x", _GENERATOR),
    "connection_weights_backward": Rule("x", _GENERATOR, results=("x", *_GENERATOR)),
    "deferred_flush": Rule("grad_sums"),
    "depth_aggregate": Rule("hiddens"),
    "depth_aggregate_backward": Rule("hiddens", results=("hiddens", "weights")),
    "depth_aggregate_norm_forward": Rule("hiddens", _NORMS, ("statistics",), (None, None, None, "statistics")),
    "depth_aggregate_norm_backward": Rule(
        "hiddens", _NORMS, ("statistics",), results=("hiddens", "weights", *_NORMS, None)
    ),
    # Its gradients, made in the forward, are multiplied by that of the loss, a DTensor.
    "linear_cross_entropy_losses": Rule(
        "hidden", ("weight", "bias"), results=(None, "hidden", "weight", "bias"), plain=False
    ),
    "depth_aggregation_step": Rule("hiddens", (*_GENERATOR, "norm_weights", "norm_biases")),
    "linear_backward": Rule("x", ("weight",), results=("x", "weight", "weight")),
    "linear_forward": Rule("x", ("weight", "bias"), alike=("weight", "bias")),
    # Heads are tokens too. The tables are those of the positions that a process has.
    "qk_norm_rotary": Rule("q", ("q_weight", "k_weight"), ("cos", "sin"), ("q", "k")),
    "qk_norm_rotary_backward": Rule(
        "grad_q", ("q_weight", "k_weight"), ("cos", "sin"), ("grad_q", "grad_k", "q_weight", "k_weight")
    ),
    "swiglu": Rule("gate"),
    "swiglu_backward": Rule("gate", results=("gate", "up")),
}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument, with their names in messages."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        yield from ((f"{name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, Tensor))


def _mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """``function`` of a tensor, or of each in a list; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value, *others)
    if isinstance(value, list | tuple):
        return [_mapped(function, x, *rest) for x, *rest in zip(value, *others, strict=True)]
    return value


class _Spread:
    """One call of an operator: where its tokens are, and how tensors come and go."""

    def __init__(self, module: ModuleType, rule: Rule, arguments: dict[str, Any]) -> None:
        self.module, self.rule = module, rule
        everything = [(label, x) for name, value in arguments.items() for label, x in _tensors(name, value)]
        mesh_of = {label: x.device_mesh for label, x in everything if self.is_spread(x)}
        self.mesh = next(iter(mesh_of.values()))
        for label, mesh in mesh_of.items():
            if mesh != self.mesh:
                raise ValueError(f"{label}: expected the mesh of the other DTensors {self.mesh}, got {mesh}")
        self.whole = [module.Replicate()] * self.mesh.ndim
        tokens = [(label, x) for label, x in _tensors(rule.tokens, arguments[rule.tokens])]
        reference = next((x for _, x in tokens if self.is_spread(x)), None)
        if reference is None:
            raise ValueError(
                f"{tokens[0][0]}: expected a DTensor, as {next(iter(mesh_of))} is one, got a plain tensor: "
                "DTensor.from_local(x, mesh, placements) says which of the tokens it has"
            )
        for name in () if rule.plain else rule.whole:
            for label, x in _tensors(name, arguments.get(name)):
                if not self.is_spread(x):
                    raise ValueError(
                        f"{label}: expected a DTensor, as {tokens[0][0]} is one, got a plain tensor: "
                        "distribute_tensor(x, mesh, [Replicate()]) makes one of it"
                    )
        alike = [(name, arguments[name]) for name in rule.alike if isinstance(arguments.get(name), Tensor)]
        for label, x in alike[1:]:
            if self.is_spread(x) != self.is_spread(alike[0][1]):
                kinds = "a plain tensor", "a DTensor"
                raise ValueError(
                    f"{label}: expected {kinds[self.is_spread(alike[0][1])]}, as {alike[0][0]} is one, got "
                    f"{kinds[self.is_spread(x)]}"
                )
        self.leading = reference.shape[:-1]
        self.placements = list(self.whole)
        for name, value in arguments.items():
            # Gradients go where that is which they are gradients of.
            if name not in (*rule.whole, *rule.local) and not name.startswith("grad"):
                for label, x in _tensors(name, value):
                    self.take_placements(label, x)

    def is_spread(self, x: Any) -> bool:
        return isinstance(x, self.module.DTensor)

    def take_placements(self, label: str, x: Any) -> None:
        """All tokens are sharded as those of the first tensor that is sharded."""
        if not self.is_spread(x):
            if x.numel() and x.shape[: len(self.leading)] != self.leading:
                raise ValueError(
                    f"{label}: expected a DTensor beside DTensors, or all tokens {list(self.leading)}, got a plain "
                    f"tensor of shape {list(x.shape)}: DTensor.from_local(x, mesh, placements) says which it has"
                )
            return
        for i, placement in enumerate(x.placements):
            sharded = type(placement) is self.module.Shard and placement.dim < len(self.leading)
            if not sharded and not placement.is_replicate():
                raise ValueError(
                    f"{label}: expected Replicate, or Shard of a dimension of tokens (the first {len(self.leading)}), "
                    f"got {placement}: call redistribute() on it before"
                )
            if sharded and self.placements[i].is_replicate():
                self.placements[i] = placement

    def local(self, name: str, value: Any) -> Any:
        """What this process has of an argument, or is sent of it."""
        placements = self.whole if name in self.rule.whole else self.placements

        def one(x: Any) -> Tensor:
            if not self.is_spread(x):  # the same on every process
                if name in (*self.rule.whole, *self.rule.local) or not x.numel():
                    return x
                x = self.spread(x, self.whole, x.shape)
            if list(x.placements) != placements:
                x = x.detach().redistribute(self.mesh, placements)
            return x.to_local()

        return _mapped(one, value)

    def spread(self, x: Tensor, placements: Sequence[Any], shape: Sequence[int]) -> Any:
        shape, stride = torch.Size(shape), [1] * len(shape)
        for i in range(len(shape) - 2, -1, -1):
            stride[i] = stride[i + 1] * max(shape[i + 1], 1)
        return self.module.DTensor.from_local(
            x.detach().contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=tuple(stride)
        )

    def of_tokens(self, x: Tensor, like: Any = None) -> Tensor:
        """A result of this process's tokens as a part of the whole; whole for an argument that is no DTensor."""
        if x.dim() < len(self.leading) or (x.shape == (0,) and len(self.leading)):
            return x  # nothing: [0]
        shape = [*self.leading, *x.shape[len(self.leading) :]] if like is None else like.shape
        result = self.spread(x, self.placements, shape)
        return result if like is None or self.is_spread(like) else result.full_tensor()

    def summed(self, x: Tensor, like: Any = None) -> Tensor:
        """The gradient of a parameter, added up over all processes."""
        if not x.numel() or like is None:
            return x
        sums = [self.module.Partial() if p.is_shard() else p for p in self.placements]
        result = self.spread(x, sums, x.shape).redistribute(self.mesh, self.whole)
        return result if self.is_spread(like) else result.to_local()

    def result(self, name: str | None, value: Any, arguments: dict[str, Any]) -> Any:
        if name in self.rule.local:
            return value
        function, like = (self.summed if name in self.rule.whole else self.of_tokens), arguments.get(name or "")
        if like is None or not isinstance(value, list | tuple):
            return _mapped(function, value) if like is None else _mapped(function, value, like)
        return _mapped(function, value, like[len(like) - len(value) :])  # the first may be deferred


def _run(module: ModuleType, rule: Rule, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = [argument.name for argument in operator._schema.arguments]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    with torch.no_grad():  # autograd is done already
        spread = _Spread(module, rule, arguments)
        given = {name: spread.local(name, value) for name, value in arguments.items()}
        results = operator(*(given[name] for name in names[: len(args)]), **{name: given[name] for name in kwargs})
        if len(operator._schema.returns) == 1:
            return spread.result(None, results, arguments)
        kinds = rule.results or (None,) * len(results)
        return tuple(spread.result(kind, x, arguments) for kind, x in zip(kinds, results, strict=True))


def register(module: ModuleType) -> None:
    """Registers the rules, given torch.distributed.tensor."""
    for name, rule in RULES.items():

        def dispatch(_: type, operator: Any, __: Any, args: Any = (), kwargs: Any = None, rule: Rule = rule) -> Any:
            return _run(module, rule, operator, args, kwargs or {})

        torch.library.register_torch_dispatch(f"muddformer::{name}", module.DTensor, dispatch)


when_imported("torch.distributed.tensor", register)
