"""Generation of tokens with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_real
from ..models import not_a_model
from .graphs import GraphedStep, graph_works
from .sampling import sample

__all__ = ["generate", "generate_stream"]


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float | None = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Continues token sequences.

    Args:
        model: a model of :func:`muddformer.build_model`.
        input_ids: prompts of one length, int64 or int32 [B, T].
        max_new_tokens: number of tokens to add, at least 0; prompt and new tokens must fit into ``block_size``.
        temperature: 0 or None: the likeliest token; otherwise drawn from ``softmax(logits / temperature)``.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the likeliest tokens that together reach this probability only, in (0, 1].
        seed: makes the draws repeatable. None: torch's global generator. In tensor parallelism all devices need one,
            the same, to draw the same tokens.
        eos_token_id: a sequence that reaches this token repeats it; all at it end the generation.
        cuda_graph: whether the steps after the first are replays of one captured CUDA graph, which spares the host most
            of its work. None: on CUDA where it is known to work and pays (an unchanged :class:`muddformer.MUDDFormer`
            without hooks, no autocast, more than 8 tokens to add).

    Returns:
        Prompt and new tokens [B, T + n], of the dtype of ``input_ids``; n is ``max_new_tokens``, or less after
        ``eos_token_id``.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came.
    """
    tokens = generate_stream(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
        cuda_graph=cuda_graph,
    )
    return torch.cat([input_ids, *tokens], dim=1)


def generate_stream(
    model: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float | None = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | None = None,
    cuda_graph: bool | None = None,
) -> Iterator[Tensor]:
    """:func:`generate`, one step at a time: yields the new tokens [B, 1] of every step as soon as they are known."""
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "new_cache", None)):
        raise not_a_model(model)
    if not getattr(config, "causal", True):
        raise ValueError(
            "model must have causal=True to generate, or later positions would see earlier ones change, got False"
        )
    _check_prompt(config.vocab_size, input_ids)
    check_integer("max_new_tokens", max_new_tokens, low=0)
    if input_ids.shape[1] + max_new_tokens > config.block_size:
        raise ValueError(
            f"input_ids and max_new_tokens must fit into block_size={config.block_size}, "
            f"got {input_ids.shape[1]} + {max_new_tokens}"
        )
    greedy = temperature is None or (temperature == 0 and not isinstance(temperature, bool))
    if not greedy:
        check_real("temperature", temperature)
    if top_k is not None:
        check_integer("top_k", top_k)
    if top_p is not None:
        check_real("top_p", top_p, 0.0, 1.0)
    if eos_token_id is not None:
        check_integer("eos_token_id", eos_token_id, config.vocab_size - 1, low=0)
    generator = None
    if seed is None and not greedy and _draws_together(model):
        raise ValueError("seed must be given in tensor parallelism, so that all devices draw the same tokens, got None")
    if seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(check_integer("seed", seed, 2**63 - 1, low=0))

    def choose(logits: Tensor) -> Tensor:
        return logits.argmax(-1, keepdim=True) if greedy else sample(logits, temperature, top_k, top_p, generator)

    if cuda_graph is None:
        cuda_graph = max_new_tokens > 8 and graph_works(model)
    elif not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be True, False or None, got {type(cuda_graph).__name__}")
    elif cuda_graph and (model.device.type != "cuda" or torch.is_autocast_enabled("cuda")):
        raise ValueError("cuda_graph must be False or None for a model that is not on CUDA, and under autocast")
    return _decode(model, input_ids, max_new_tokens, choose, eos_token_id, cuda_graph)


@torch.no_grad()
def _decode(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    eos_token_id: int | None,
    cuda_graph: bool,
) -> Iterator[Tensor]:
    batch, length = input_ids.shape
    cache = model.new_cache(batch, length + max_new_tokens)
    ended = torch.zeros(batch, 1, device=input_ids.device, dtype=torch.bool)
    fresh = input_ids
    step: Callable[[Tensor], Tensor] = lambda ids: model(ids, cache=cache)  # noqa: E731
    for i in range(max_new_tokens):
        if i == 1 and cuda_graph and not torch.is_autocast_enabled("cuda"):
            step = GraphedStep(step, cache, fresh)
        logits = step(fresh)[:, -1]
        if hasattr(logits, "full_tensor"):  # a DTensor
            logits = logits.full_tensor()
        fresh = choose(logits).to(input_ids.dtype)
        if eos_token_id is not None:
            fresh = fresh.masked_fill(ended, eos_token_id)
            ended = fresh == eos_token_id
        yield fresh
        if eos_token_id is not None and bool(ended.all()):
            return


def _draws_together(model: nn.Module) -> bool:
    """Whether parameters are DTensors that FSDP2 does not gather: processes share every token."""
    return not hasattr(model, "unshard") and any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _check_prompt(vocab_size: int, input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [batch, tokens] and not empty, got shape {list(input_ids.shape)}")
    low, high = (value.item() for value in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise IndexError(f"input_ids must be from 0 to vocab_size - 1 = {vocab_size - 1}, got {low} to {high}")
