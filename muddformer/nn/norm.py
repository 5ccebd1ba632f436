"""Norms over the model width D, and what the aggregation needs to know of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm", "norm_kind"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension [D], in the dtype of ``x``.

    Unlike torch.nn.RMSNorm, a float32 weight meets a bfloat16 input (as under autocast) in the fused kernel.

    Args:
        dim: width D.
        eps: added to the mean square.
        init: value of a fresh weight.
    """

    def __init__(
        self, dim: int, eps: float = 1e-6, *, init: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ``init``."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


def norm_kind(norms: Iterable[nn.Module | None], x: Tensor) -> tuple[str, float] | None:
    """What the aggregation needs to know to norm its streams itself.

    Args:
        norms: None stands for a way without a norm.
        x: a hidden state [..., D].

    Returns:
        ``("rms" or "layer", eps)`` if the norms are all RMSNorm or all LayerNorm, without hooks, with weights [D] that
        are there (not sharded over devices) in the dtype of ``x`` or float32, and one eps. None for any others.
    """
    kinds = set()
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for norm in norms:
        if norm is None:
            continue
        weight = getattr(norm, "weight", None)
        if type(norm) not in (RMSNorm, nn.LayerNorm) or type(weight) not in (Tensor, nn.Parameter):
            return None
        if norm._forward_hooks or norm._forward_pre_hooks or weight.shape != x.shape[-1:]:
            return None
        if not autocast and weight.dtype not in (x.dtype, torch.float32):
            return None
        kinds.add(("rms" if type(norm) is RMSNorm else "layer", norm.eps, weight.dtype))
    return kinds.pop()[:2] if len(kinds) == 1 else None
