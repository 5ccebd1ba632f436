"""Norms and rotation of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import call

__all__ = ["qk_norm_rotary"]


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of queries and keys, and its rotation by the position, in one pass each way.

    Entry i of a head pairs with entry i + half; the entries from 2 * half on pass through.

    Args:
        q: queries [B, T, H, E], as the projection leaves them; a slice of a wider one too.
        k: keys [B, T, Hk, E].
        cos, sin: of the T positions, float32 [T, half] or [1, T, half] or, where each sequence has positions of its
            own, [B, T, half], half <= E / 2. They get no gradients.
        q_weight, k_weight: of the norms, [E] each, of the dtype of ``q`` or float32; None, both of them: no norms.
        eps: added to the mean square, at least 0.

    Returns:
        Queries and keys of the shapes that came. Attention takes them as ``transpose(1, 2)``: its result has the order
        of its queries in memory, so that it can be flattened without a copy.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return call(torch.ops.muddformer.qk_norm_rotary.default, q, k, cos, sin, q_weight, k_weight, eps)
