"""What torch.jit.trace records of the operators: the same with gradients and without, which its own check compares.

A trace knows no gradients, so there is nothing to chain in it: chained operators are recorded as the others, which
autograd differentiates when the trace runs. Questions that are answered with a number are no part of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (loads libmuddformer, which registers the operators)

__all__: list[str] = []

_ops = torch.ops.muddformer


def _depth_aggregate_chained(hiddens: Sequence[Tensor], weights: Tensor, *_: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _ops.depth_aggregate(hiddens, weights), list(hiddens)


def _connection_weights_chained(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _ops.connection_weights(x, *args, **kwargs), x


_rules = torch.library.Library("muddformer", "IMPL")
for _name in ("depth_aggregate_chained", "depth_aggregate_chained.deferred"):
    _rules.impl(_name, _depth_aggregate_chained, "Tracer")
_rules.impl("connection_weights_chained", _connection_weights_chained, "Tracer")
for _name in ("fuses_norms", "fuses_step", "step_tokens"):
    _rules.impl(_name, torch.library.fallthrough_kernel, "Tracer")
