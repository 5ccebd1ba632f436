"""A layer of connections in plain PyTorch, to compare with: what one would write from the paper."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

from .. import reference
from .connections import Connections
from .depth_aggregation import DepthAggregation

__all__ = ["depth_aggregation", "naive_connections"]


def depth_aggregation(
    layer: DepthAggregation,
    hiddens: Sequence[Tensor],
    prior: Tensor | None = None,
    stream_norms: Sequence[nn.Module | None] | None = None,
    deferral: object = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What a whole layer of connections returns, as one writes it from the paper; autograd adds up the gradients."""
    prior, newest = layer.prior if prior is None else prior, hiddens[-1]
    options = {"eps": layer.eps, "gelu_approximate": layer.gelu_approximate, "cap": layer.cap}
    if layer.dynamic:
        scale = None if layer.norm is None else layer.norm.weight
        weights = reference.connection_weights(newest, layer.w1.weight, layer.w2.weight, prior, scale=scale, **options)
    else:
        prior = prior if layer.cap is None else layer.cap * torch.tanh(prior / layer.cap)
        weights = prior.to(newest.dtype).expand(*newest.shape[:-1], *prior.shape)
    hiddens = [*hiddens[:-1], newest if layer.pre_norm is None else layer.pre_norm(newest)]
    streams = reference.depth_aggregate(hiddens, weights)
    if layer.post_norms is not None:
        streams = [newest + norm(y) for norm, y in zip(layer.post_norms, streams, strict=True)]
    if isinstance(layer.ways, str):
        by_way = dict(zip(layer.ways, streams, strict=True))
        streams = [by_way.get(way, newest) for way in "qkvr"]
    norms = [None] * len(streams) if stream_norms is None else stream_norms
    return [y if norm is None else norm(y) for norm, y in zip(norms, streams, strict=True)], hiddens


@contextlib.contextmanager
def naive_connections(active: bool = True) -> Iterator[None]:
    """While it lasts, every layer of connections computes by :func:`depth_aggregation`, and no gradient is deferred."""
    with contextlib.ExitStack() as stack:
        if active:
            stack.enter_context(mock.patch.object(DepthAggregation, "forward", depth_aggregation))
            stack.enter_context(mock.patch.object(Connections, "_defers", lambda *_: False))
        yield
