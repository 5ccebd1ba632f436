"""Decode steps as replays of a CUDA graph."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import KVCache, Pretrained

__all__ = ["GraphedStep", "graph_works"]

_capturing = threading.Lock()


class GraphedStep:
    """A decode step of one token for every sequence, captured once and replayed with other tokens.

    The cache has fixed shapes and keeps the next position on the device, so the same kernels serve every step. The step
    is replayed on the stream on which it was made: graphs of one stream share the workspaces of libraries.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], cache: KVCache, ids: Tensor) -> None:
        self.cache = cache
        self.ids = ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        # A first run sets up libraries and workspaces. The place that it takes in the cache is taken again by the
        # first replay, which overwrites what is there.
        used, position = cache.used, cache._next.clone()
        current = torch.cuda.current_stream(ids.device)
        stream = _capture_stream(current)
        with _capturing, torch.cuda.device(ids.device):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step(self.ids)
                cache.used = used
                cache._next.copy_(position)
            current.wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = step(self.ids)
        cache.used = used

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, vocab_size], overwritten by the next call."""
        self.ids.copy_(ids)
        self.cache.used += 1
        self.graph.replay()
        return self.logits


@functools.cache
def _capture_stream(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where the graphs of a stream are captured: always the same, as each one on which matrix products have run keeps a
    cuBLAS workspace of 32 MiB."""
    return torch.cuda.Stream(stream.device)


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
