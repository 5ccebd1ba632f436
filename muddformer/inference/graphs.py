"""Decode steps as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import KVCache, Pretrained

__all__ = ["GraphedStep", "graph_works"]


class GraphedStep:
    """A decode step of one token for every sequence, captured once and replayed with other tokens.

    The cache has fixed shapes and keeps the next position on the device, so the same kernels serve every step.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], cache: KVCache, ids: Tensor) -> None:
        self.cache = cache
        self.ids = ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        # A first run sets up libraries and workspaces. The place that it takes in the cache is taken again by the
        # first replay, which overwrites what is there.
        used, position = cache.used, cache._next.clone()
        stream = torch.cuda.Stream(ids.device)
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            step(self.ids)
            cache.used = used
            cache._next.copy_(position)
        torch.cuda.current_stream(ids.device).wait_stream(stream)
        graph = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(ids.device), graph:
            self.logits = step(self.ids)
        cache.used = used

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, vocab_size], overwritten by the next call."""
        self.ids.copy_(ids)
        self.cache.used += 1
        self.graph.replay()
        return self.logits


def graph_works(model: nn.Module) -> bool:
    """Whether nothing but our own code, which can be captured, runs in a step of this model."""
    return (
        isinstance(model, Pretrained)
        and model.device.type == "cuda"
        and not torch.is_autocast_enabled("cuda")
        and not any(
            m._forward_hooks
            or m._forward_pre_hooks
            or m._compiled_call_impl is not None
            or not type(m).__module__.startswith(("torch.nn.", "muddformer."))
            or "forward" in vars(m)
            for m in model.modules()
        )
    )
