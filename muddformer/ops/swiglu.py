"""The product of a SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import call

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``F.silu(gate) * up`` in one pass, and one in the backward, which makes ``silu(gate)`` again.

    Args:
        gate: [..., F]. Without ``up``: [..., 2 F], gate and up side by side; their gradient is one tensor too.
        up: of the shape, dtype and device of ``gate``.

    Returns:
        [..., F], in the dtype of the inputs, rounded once.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return call(torch.ops.muddformer.swiglu.default, gate, up)
