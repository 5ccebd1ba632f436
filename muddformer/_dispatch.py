"""Calls of registered operators from Python, and what is said of an argument of a wrong kind."""

from __future__ import annotations

import numbers
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["call", "check_kind", "constant", "is_int64", "kind_of"]


def kind_of(value: object) -> str:
    """What came in the place of something else, in a few words."""
    if isinstance(value, Tensor):
        return f"one tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return textwrap.shorten(repr(value), 60)
    return f"a value of type {type(value).__name__}"


# What the dispatcher takes for an argument, by the name of its type in the schema.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a tensor", lambda value: isinstance(value, Tensor)),
    "float": ("a number", lambda value: isinstance(value, numbers.Real | torch.SymFloat)),
    "int": ("a 64-bit integer", lambda value: isinstance(value, torch.SymInt) or is_int64(value)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "str": ("a string", lambda value: isinstance(value, str)),
}


def is_int64(value: object) -> bool:
    return isinstance(value, numbers.Integral) and -(2**63) <= value < 2**63


def check_kind(name: str, value: Any, kind: str) -> None:
    """Refuses a value that is not of this type of a schema."""
    if kind.startswith("Optional["):
        if value is not None:
            check_kind(name, value, kind.removeprefix("Optional[").removesuffix("]"))
    elif kind.startswith("List["):
        entry = kind.removeprefix("List[").removesuffix("]")
        if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
            noun = "integers" if entry == "int" else "tensors"
            raise TypeError(f"{name}: expected a list of {noun}, got {kind_of(value)}")
        for i, each in enumerate(value):
            check_kind(f"{name}[{i}]", each, entry)
    elif kind in _KINDS:
        expected, fits = _KINDS[kind]
        if not fits(value):
            raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}")


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Calls an operator. An argument of a wrong kind is a TypeError that names it, and costs others nothing."""
    try:
        return op(*arguments)
    except RuntimeError:
        for argument, value in zip(op._schema.arguments, arguments, strict=False):
            check_kind(argument.name, value, str(argument.type))
        raise


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
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
