"""The seam between our attention and the attention functions, masks and caches of transformers."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["CACHE", "Attend", "LayerCache", "make_mask"]

CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else (
    "past_key_values"
)  # fmt: skip
"""What this version of transformers calls a cache, in calls and in outputs."""

_UPDATE_TAKES_PLACES = "cache_kwargs" in inspect.signature(Cache.update).parameters
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


def make_mask(config: PretrainedConfig, x: Tensor, mask: Any, cache: Any, position_ids: Tensor, places: Tensor) -> Any:
    """The mask that the attention function of ``config`` takes; None where causal, or nothing hidden, says it all.

    Args:
        config: the model's configuration.
        x: embeddings [B, T, D].
        mask: [B, tokens of the cache and T], 0 for padding; or made already; or None.
        cache: of transformers, or None.
        position_ids: [B, T] or [1, T].
        places: of the T tokens in the cache, [T].
    """
    if not config.is_causal and "or_mask_function" not in _MASK_ARGUMENTS:
        raise ValueError("config must have causal=True with this version of transformers, got False")
    given = {
        "config": config,
        "inputs_embeds": x,
        "input_embeds": x,
        "attention_mask": mask,
        "cache": cache,
        "past_key_values": cache,
        "position_ids": position_ids,
        "cache_position": places,
    }
    return create_causal_mask(**{name: value for name, value in given.items() if name in _MASK_ARGUMENTS})


class LayerCache:
    """A cache of transformers as :class:`muddformer.models.layers.Attention` calls it.

    Args:
        cache: of transformers.
        places: of the new tokens in the cache [T], which a static cache of older versions has to be told.
    """

    def __init__(self, cache: Any, places: Tensor) -> None:
        self.cache = cache
        self.given = ({"cache_position": places},) if _UPDATE_TAKES_PLACES else ()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, heads, count, head width] of one block; returns the ones to attend to."""
        return self.cache.update(k, v, layer, *self.given)


class Attend:
    """An attention function of transformers in the place of ours.

    Args:
        implementation: its name: ``"sdpa"``, ``"flex_attention"``, ``"eager"``, or one that was registered.
        kwargs: go to every call.
        keep: keep what it returns beside its result, the attention weights.

    Attributes:
        weights: those that were kept, [B, H, T, length] for each block; none where the function has none to show.
    """

    def __init__(self, implementation: str | None, kwargs: dict[str, Any], keep: bool) -> None:
        own = implementation in (None, "eager")
        self.function = eager_attention if own else ALL_ATTENTION_FUNCTIONS[implementation]
        self.kwargs = kwargs
        self.keep = keep
        self.weights: list[Any] = []

    def __call__(self, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """See :func:`muddformer.models.layers.scaled_dot_product`."""
        scale = 1.0 / math.sqrt(attention.head_dim)  # to the last bit what torch takes for None
        y, weights = self.function(attention, q, k, v, mask, dropout=0.0, scaling=scale, **self.kwargs)
        if self.keep and weights is not None:
            self.weights.append(weights)
        if y.dim() == 4:
            return y
        return y.reshape(q.shape[0], q.shape[2], q.shape[1], -1)  # vLLM's is [B * T, H * E]


def eager_attention(
    attention: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, which has its weights to show: [B, T, H, E] and [B, H, T, length]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
