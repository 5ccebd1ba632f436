"""What the connections of a trained model do: weights, likeness of the streams, attention sinks, norms of the history.

L: number of blocks; H: heads; C, S: ways and sources of an aggregation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..models import MUDDFormer

__all__ = ["Inspection", "inspect_model"]

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Inspection:
    """Means over tokens, float32 tensors on the CPU.

    Attributes:
        plan: hidden states j that the aggregation after block i mixes, by i.
        ways: names of the ways of each aggregation, by i: a part of ``"qkvr"``.
        weight_means, weight_stds: mean and standard deviation of the connection weights [C, S], by i.
        similarities: by ``"q"``, ``"k"``, ``"v"`` (what attention is given) and ``"x"`` (the hidden states behind the
            blocks): mean cosine similarity between any two blocks, [L, L].
        sinks: share of the attention that later tokens pay to the first one, [L, H].
        history_rms: root mean square of X_0 .. X_L, [L + 1].
    """

    plan: dict[int, tuple[int, ...]]
    ways: dict[int, str]
    weight_means: dict[int, Tensor]
    weight_stds: dict[int, Tensor]
    similarities: dict[str, Tensor]
    sinks: Tensor
    history_rms: Tensor

    def to_dict(self) -> dict[str, Any]:
        """The same in lists, for JSON."""
        return {
            "plan": {i: list(sources) for i, sources in self.plan.items()},
            "ways": self.ways,
            "weight_means": {i: mean.tolist() for i, mean in self.weight_means.items()},
            "weight_stds": {i: std.tolist() for i, std in self.weight_stds.items()},
            "similarities": {name: matrix.tolist() for name, matrix in self.similarities.items()},
            "sinks": self.sinks.tolist(),
            "history_rms": self.history_rms.tolist(),
        }


@torch.no_grad()
def inspect_model(model: MUDDFormer, batches: Iterable[Tensor]) -> Inspection:
    """Runs a model over token ids and measures what its connections do. The model is left as it was.

    Args:
        model: with MUDD connections or without.
        batches: token ids [B, T], int64, on any device; T at least 2.

    Raises:
        TypeError: if the model is none of ours.
        ValueError: if there is no batch, or one of less than 2 tokens.
    """
    if not isinstance(model, MUDDFormer):
        raise TypeError(f"model must be a MUDDFormer, got {type(model).__name__}")
    sums, count, training = _Sums(), 0, model.training
    model.eval()
    try:
        for ids in batches:
            if ids.dim() != 2 or ids.shape[1] < 2:
                raise ValueError(f"batches must be token ids [B, T] with T of at least 2, got {list(ids.shape)}")
            _measure(model, ids.to(model.device), sums)
            count += 1
    finally:
        model.train(training)
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    layers = model.config.n_layer
    means = {i: sums.mean("weight", i) for i in model.plan}
    stds = {i: (sums.mean("weight^2", i) - means[i].square()).clamp(min=0).sqrt() for i in model.plan}
    ways = {}
    for i, da in zip(model.plan, model.dynamic_dense, strict=True):
        ways[i] = da.ways if isinstance(da.ways, str) else "r"
    return Inspection(
        plan=dict(model.plan),
        ways=ways,
        weight_means={i: mean.float() for i, mean in means.items()},
        weight_stds={i: std.float() for i, std in stds.items()},
        similarities={name: sums.mean("similarity", name).float() for name in "qkvx"},
        sinks=torch.stack([sums.mean("sink", i) for i in range(layers)]).float(),
        history_rms=torch.stack([sums.mean("square", i) for i in range(layers + 1)]).sqrt().float(),
    )


class _Sums:
    """Running means over tokens, in float64."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, Any], Tensor] = {}
        self._counts: dict[tuple[str, Any], int] = defaultdict(int)

    def add(self, name: str, key: Any, values: Tensor, count: int) -> None:
        """Adds a sum of ``count`` tokens."""
        values = values.double().cpu()
        self._totals[name, key] = self._totals[name, key] + values if (name, key) in self._totals else values
        self._counts[name, key] += count

    def mean(self, name: str, key: Any) -> Tensor:
        """The mean of all that was added."""
        return self._totals[name, key] / self._counts[name, key]


class _Sinks(TorchFunctionMode):
    """Measures every call of ``scaled_dot_product_attention``; the n-th belongs to block n."""

    def __init__(self, sums: _Sums) -> None:
        super().__init__()
        self._sums, self._calls = sums, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            self._sums.add("sink", self._calls, _sink_sums(q, k, kwargs.get("is_causal", False)), _later_tokens(q))
            self._calls += 1
        return func(*args, **kwargs)


def _later_tokens(q: Tensor) -> int:
    return q.shape[0] * (q.shape[2] - 1)


def _sink_sums(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Attention [H] that all tokens but the first pay to the first one, summed over tokens."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    total = torch.zeros(q.shape[1], device=q.device, dtype=torch.float64)
    for begin in range(1, q.shape[2], _QUERIES_AT_ONCE):
        rows = q[:, :, begin : begin + _QUERIES_AT_ONCE].float()
        scores = rows @ k.mT / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(begin + 1)
            scores = scores.masked_fill(later, float("-inf"))
        total += scores.softmax(-1)[..., 0].sum((0, 2))
    return total


def _measure(model: MUDDFormer, ids: Tensor, sums: _Sums) -> None:
    streams: dict[str, list[Tensor]] = {name: [] for name in "qkvx"}
    tokens = ids.numel()

    def keep(name: str, x: Tensor) -> None:
        streams[name].append(F.normalize(x.float(), dim=-1).flatten(0, -2))

    def before_attention(module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, x in zip("qkv", args[:3], strict=True):
            keep(name, x)

    def hidden(index: int, x: Tensor) -> None:
        sums.add("square", index, x.float().square().mean(-1).sum(), tokens)
        if index:
            keep("x", x)

    def before_aggregation(i: int, da: nn.Module, args: tuple[Any, ...]) -> None:
        hiddens, prior = args[0], args[1]
        weights = da.connection_weights(hiddens[-1], prior)[0].double().flatten(0, -3)
        sums.add("weight", i, weights.sum(0), tokens)
        sums.add("weight^2", i, weights.square().sum(0), tokens)

    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        hook(model.tok_embeddings.register_forward_hook(lambda _, __, x: hidden(0, x)))
        for index, block in enumerate(model.layers):
            hook(block.attention.register_forward_pre_hook(before_attention))
            hook(block.register_forward_hook(lambda _, __, x, i=index + 1: hidden(i, x)))
        for i, da in zip(model.plan, model.dynamic_dense, strict=True):
            hook(da.register_forward_pre_hook(lambda da, args, i=i: before_aggregation(i, da, args)))
        stack.enter_context(_Sinks(sums))
        model(ids)
    for name, kept in streams.items():
        matrix = torch.stack([torch.stack([(a * b).sum() for b in kept]) for a in kept])
        sums.add("similarity", name, matrix, tokens)
