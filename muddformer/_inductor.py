"""The operators as torch.compile's backend, Inductor, is to take them: called as they are.

It does so by itself, but up to torch 2.11 it first writes a message that prints every argument with all that it was
made from: for an operator at the end of a deep model that takes minutes or longer.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch

from . import _library  # noqa: F401  (loads libmuddformer, which registers the operators)
from ._imports import when_imported

__all__: list[str] = []


def _call_as_they_are(lowering: ModuleType) -> None:
    with contextlib.suppress(AttributeError, TypeError):  # of another torch, which can do without
        _register(lowering)


def _register(lowering: ModuleType) -> None:
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "muddformer":
            op = getattr(getattr(torch.ops.muddformer, name), schema.overload_name or "default")
            if op not in lowering.lowerings and op not in lowering.decompositions:
                constraint = lowering.tag_to_layout_constraint(torch._library.utils.get_layout_constraint_tag(op))
                lowering.make_fallback(op, constraint, warn=False)


when_imported("torch._inductor.lowering", _call_as_they_are)
