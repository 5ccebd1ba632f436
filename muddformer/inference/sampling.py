"""The choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample"]


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draws token ids [B, 1] from ``logits`` [B, vocab_size].

    The arguments are those of :func:`generate`, which checks them and does without a draw where the likeliest token is
    wanted: ``temperature`` is more than 0, ``top_k`` at least 1 or None, ``top_p`` more than 0 or None.
    """
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
