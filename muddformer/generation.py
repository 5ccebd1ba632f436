"""Generation of text with a cache of keys and values.

The hidden states that MUDD connections mix belong to one token, so a decode step makes those of its own token anew and
needs nothing of earlier tokens but their keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .config import MUDDFormerConfig, check_integer, check_real

__all__ = ["KVCache", "generate", "generate_stream"]


class KVCache:
    """Keys and values of all blocks, allocated once: [L, B, key/value heads, length, head width] each.

    Shapes do not depend on how many tokens are in the cache, and the next position is kept on the device. Give it to
    ``model(input_ids, cache=cache)``, first with the prompt, then with what follows. Without gradients only.

    Args:
        config: the model's configuration.
        batch_size: number of sequences B.
        length: number of tokens that it holds, at most ``config.block_size``.
        device, dtype: of the model's parameters.

    Attributes:
        used: number of tokens that are in the cache.
    """

    def __init__(
        self,
        config: MUDDFormerConfig,
        batch_size: int,
        length: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("batch_size", batch_size)
        check_integer("length", length, config.block_size)
        shape = (config.n_layer, batch_size, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.used = 0
        self._next = torch.zeros(1, device=device, dtype=torch.int64)
        self._slots = torch.arange(length, device=device)
        self._positions = self._slots
        self._prompt = True

    def advance(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Makes room for ``count`` tokens.

        Returns:
            ``(positions, mask)``: their positions, int64 [count], and which slots of the cache they see, bool
            [count, length]; no mask for the first ones, which see each other causally.

        Raises:
            ValueError: if the cache is too short.
            RuntimeError: if gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a KVCache works only without gradients: under torch.no_grad() or torch.inference_mode()"
            )
        if self.used + count > len(self._slots):
            raise ValueError(
                f"input_ids has {count} tokens, but of the {len(self._slots)} places of the cache {self.used} are taken"
            )
        self._prompt = self.used == 0
        self.used += count
        self._positions = self._next + self._slots[:count]
        self._next += count
        return self._positions, None if self._prompt else self._slots <= self._positions[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, heads, count, head width] of one block; returns the ones to attend to."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self._positions, k.to(keys.dtype))
        values.index_copy_(2, self._positions, v.to(values.dtype))
        return (k, v) if self._prompt else (keys, values)


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
        seed: makes the draws repeatable. None: torch's global generator.
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
    if not (isinstance(model, nn.Module) and isinstance(config, MUDDFormerConfig)):
        raise TypeError(f"model must be a MUDDFormer, got {type(model).__name__}")
    _check_prompt(config, input_ids)
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
    if seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(check_integer("seed", seed, 2**63 - 1, low=0))

    def choose(logits: Tensor) -> Tensor:
        return logits.argmax(-1, keepdim=True) if greedy else sample(logits, temperature, top_k, top_p, generator)

    if cuda_graph is None:
        cuda_graph = max_new_tokens > 8 and _graph_works(model)
    elif not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be True, False or None, got {type(cuda_graph).__name__}")
    elif cuda_graph and (model.tok_embeddings.weight.device.type != "cuda" or torch.is_autocast_enabled("cuda")):
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
    weight = model.tok_embeddings.weight
    cache = KVCache(model.config, batch, length + max_new_tokens, device=weight.device, dtype=weight.dtype)
    ended = torch.zeros(batch, 1, device=input_ids.device, dtype=torch.bool)
    fresh = input_ids
    step: Callable[[Tensor], Tensor] = lambda ids: model(ids, cache=cache)  # noqa: E731
    for i in range(max_new_tokens):
        if i == 1 and cuda_graph and not torch.is_autocast_enabled("cuda"):
            step = _GraphedStep(step, cache, fresh)
        fresh = choose(step(fresh)[:, -1]).to(input_ids.dtype)
        if eos_token_id is not None:
            fresh = fresh.masked_fill(ended, eos_token_id)
            ended = fresh == eos_token_id
        yield fresh
        if eos_token_id is not None and bool(ended.all()):
            return


class _GraphedStep:
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


def _graph_works(model: nn.Module) -> bool:
    """Whether nothing but our own code, which can be captured, runs in a step of this model."""
    from .models import MUDDFormer

    return (
        type(model) is MUDDFormer
        and model.tok_embeddings.weight.device.type == "cuda"
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


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draws token ids [B, 1] from ``logits`` [B, vocab_size]; see :func:`generate`."""
    # The likeliest first: what top_k and top_p keep is then a prefix, never empty. float64 bears any temperature.
    logits, order = logits.double().sort(dim=-1, descending=True, stable=True)
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def _check_prompt(config: MUDDFormerConfig, input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [batch, tokens] and not empty, got shape {list(input_ids.shape)}")
    low, high = (value.item() for value in input_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise IndexError(f"input_ids must be from 0 to vocab_size - 1 = {config.vocab_size - 1}, got {low} to {high}")
