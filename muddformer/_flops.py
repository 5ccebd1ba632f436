"""What the operators count for in torch.utils.flop_counter: two for every multiplication with an addition.

N: tokens; D: model width; S: sources; C: ways; K: hidden width of the generator;
V: classes of a head. Norms, GELU and additions do not
count, as those of PyTorch's own operators do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _library  # noqa: F401  (loads libmuddformer, which registers the operators)

__all__: list[str] = []

_ops = torch.ops.muddformer
_Shape = Sequence[int]


def _mixing(hiddens: Sequence[_Shape], weights: _Shape) -> int:
    """N * D * C * S multiplications."""
    return 2 * math.prod(weights) * hiddens[0][-1]


@register_flop_formula([_ops.depth_aggregate, _ops.depth_aggregate_norm_forward])
def _aggregate(hiddens: Sequence[_Shape], weights: _Shape, *_: Any, **__: Any) -> int:
    return _mixing(hiddens, weights)


@register_flop_formula([_ops.depth_aggregate_backward, _ops.depth_aggregate_norm_backward])
def _aggregate_backward(
    grad_outputs: Any, grad_hiddens: Any, hiddens: Sequence[_Shape], weights: _Shape, *args: Any, **kwargs: Any
) -> int:
    # The products with the outputs' gradients: over D for the weights, over C for the hidden states that are not
    # deferred. The number of these comes last.
    kwargs.pop("out_shape", None)
    deferred = kwargs.get("deferred", args[-1] if args and isinstance(args[-1], int) else 0)
    sources = len(hiddens)
    return _mixing(hiddens, weights) * (2 * sources - deferred) // sources


@register_flop_formula(_ops.deferred_flush)
def _deferred_flush(grad_hiddens: Sequence[Any], grad_sums: Any, weights: Sequence[_Shape], **__: Any) -> int:
    shapes = [shape for shape in (*grad_hiddens, *grad_sums) if shape is not None]
    ways = sum(math.prod(shape[:-1]) for shape in weights)  # N * C of all layers
    return 2 * ways * len(grad_hiddens) * shapes[0][-1]


def _generating(x: _Shape, w1: _Shape, w2: _Shape) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2))


@register_flop_formula([_ops.connection_weights, _ops.connection_weights_forward])
def _generate(x: _Shape, w1: _Shape, w2: _Shape, *_: Any, **__: Any) -> int:
    return _generating(x, w1, w2)


@register_flop_formula(_ops.connection_weights_backward)
def _generate_backward(grad_weights: _Shape, grad_x: Any, x: _Shape, w1: _Shape, w2: _Shape, *_: Any, **__: Any) -> int:
    return 2 * _generating(x, w1, w2)


@register_flop_formula(_ops.depth_aggregation_step)
def _step(hiddens: Sequence[_Shape], w1: Any, w2: Any, prior: _Shape, *_: Any, **__: Any) -> int:
    tokens = math.prod(hiddens[0][:-1])
    made = 0 if w1 is None else _generating(hiddens[-1], w1, w2)
    return made + 2 * tokens * math.prod(prior) * hiddens[0][-1]


@register_flop_formula(_ops.linear_forward)
def _linear(x: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(_ops.linear_backward)
def _linear_backward(grad: Any, x: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    kwargs.pop("out_shape", None)
    return 2 * math.prod(x) * weight[0] * sum(kwargs.get("wanted", args[-1])[:2])


@register_flop_formula(_ops.linear_cross_entropy_losses)
def _losses(hidden: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    # N * V * D for the logits, and as many for each of the gradients of hidden states and head.
    kwargs.pop("out_shape", None)
    wanted = kwargs.get("wanted", args[-1])
    return 2 * math.prod(hidden) * weight[0] * (1 + sum(wanted[:2]))
