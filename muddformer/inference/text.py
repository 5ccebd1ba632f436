"""Text from a trained model, as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .generate import generate_stream
from .loading import load_model_and_tokenizer, resolve_checkpoint
from .tokenizer import SEPARATOR, StreamDecoder

__all__ = ["stream_text", "stream_tokens"]


def stream_text(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[str]:
    """Continues a text until the model ends the document.

    Args:
        checkpoint: a checkpoint folder with ``tokenizer.json``, or the folder of a run.
        prompt: beginning of the text; empty: the beginning of a document.
        max_new_tokens: longest continuation.
        temperature, top_k, top_p, seed: see :func:`muddformer.generate`.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        An iterator over the new text in pieces of whole characters, each made when it is asked for.

    Raises:
        InputError: at once, if the checkpoint cannot be used.
    """
    model, tokenizer = load_model_and_tokenizer(resolve_checkpoint(checkpoint), device)
    decoder = StreamDecoder(tokenizer)
    end = tokenizer.token_to_id(SEPARATOR)
    ids = tokenizer.encode(prompt).ids or [0 if end is None else end]

    def pieces() -> Iterator[str]:
        for token in stream_tokens(model, ids, max_new_tokens, temperature, top_k, top_p, seed):
            if token == end:
                break
            yield decoder.push(token)
        yield decoder.flush()

    return pieces()


def stream_tokens(
    model: nn.Module,
    ids: list[int],
    count: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Draws ``count`` tokens one after the other, each handed on before the next is made.

    They may be more than the model's ``block_size``: when the context is full, it goes on with the newer half of it.

    Args:
        model: a model of :func:`muddformer.build_model`.
        ids: the prompt, not empty.
        count: number of new tokens.
        temperature, top_k, top_p, seed: see :func:`muddformer.generate`.

    Yields:
        Token ids.
    """
    device, limit = model.device, model.config.block_size
    context = ids[-limit:]
    while count > 0:
        if len(context) == limit:
            context = context[limit - limit // 2 :]
        fitting = min(count, limit - len(context))
        prompt = torch.tensor([context], device=device)
        for token in generate_stream(
            model, prompt, max_new_tokens=fitting, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        ):
            context = [*context, token.item()]
            yield context[-1]
        count, seed = count - fitting, (seed + 1) % 2**63
