"""Norms over the model width D, and what the aggregation needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import StreamNorms

__all__ = ["RMSNorm", "as_stream_norms", "autocast_dtype"]


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


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives ``x`` in an operator, None where it leaves ``x`` as it is."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def as_stream_norms(norms: Sequence[nn.Module | None], x: Tensor) -> StreamNorms | None:
    """These norms as the operators take them.

    Args:
        norms: None stands for a way without a norm.
        x: a hidden state [..., D].

    Returns:
        None if the operators cannot take them. They can if all are RMSNorm or all LayerNorm, without hooks, of one eps
        and with parameters [D] of one dtype, that of ``x`` or float32, which are there (not sharded over devices).
    """
    kinds, autocast = set(), autocast_dtype(x) is not None
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
    if len(kinds) > 1:
        return None
    kind, eps, _ = kinds.pop() if kinds else ("none", 0.0, None)
    weights = [None if norm is None else norm.weight for norm in norms]
    return StreamNorms(weights, [getattr(norm, "bias", None) for norm in norms], kind, eps)
