"""What autograd adds up by itself in a backward: gradients that several readers of one hidden state send back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Adds(TorchDispatchMode):
    """Counts additions of two tensors [B, T, width] outside of the formulas of the graph's nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.inside = False
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            shapes = [x.shape for x in args[:2] if isinstance(x, Tensor) and x.dim() == 3]
            self.count += len(shapes) == 2 and shapes[0] == shapes[1] and shapes[0][-1] == self.width
        return function(*args, **(kwargs or {}))

    def enter(self, *_: Any) -> None:
        self.inside = True

    def leave(self, *_: Any) -> None:
        self.inside = False


def gradient_adds(loss: Tensor, width: int) -> int:
    """How many times the eager backward of a loss adds two gradients of hidden states [B, T, width]."""
    adds = _Adds(width)
    nodes, found = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        node = nodes.pop()
        node.register_prehook(adds.enter)
        node.register_hook(adds.leave)
        nodes += (new := {other for other, _ in node.next_functions if other is not None} - found)
        found |= new
    with adds, torch.autograd.set_multithreading_enabled(False):  # in this thread, where the mode is
        loss.backward()
    return adds.count
