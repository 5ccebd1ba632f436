"""Norms over the model width D, and what the aggregation needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import StreamNorms

__all__ = ["RMSNorm", "as_stream_norms", "autocast_dtype", "is_plain"]


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


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is of one of these very classes, without hooks, and its parameters are ordinary tensors.

    Of such a module an operator may read the parameters. Any other (an adapter, a quantised or a parametrised module,
    one with weights that are sharded over devices) has to be called.
    """
    if type(module) not in types or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # A None among the parameters is one that is left out, such as a bias. FSDP1 puts tensors in their places.
    weights = (getattr(module, name, None) for name in ("weight", "bias"))
    return all(weight is None or type(weight) in (Tensor, nn.Parameter) for weight in weights)


def as_stream_norms(norms: Sequence[nn.Module | None], x: Tensor) -> StreamNorms | None:
    """These norms as the operators take them.

    Args:
        norms: None stands for a way without a norm.
        x: a hidden state [..., D].

    Returns:
        None if the operators cannot take them. They can if all are RMSNorm or all LayerNorm, plain ones
        (:func:`is_plain`), of one eps and with parameters [D] of one dtype, that of ``x`` or float32.
    """
    kinds, autocast = set(), autocast_dtype(x) is not None
    for norm in norms:
        if norm is None:
            continue
        if not is_plain(norm, RMSNorm, nn.LayerNorm) or (weight := norm.weight) is None or weight.shape != x.shape[-1:]:
            return None
        if weight.device != x.device or (not autocast and weight.dtype not in (x.dtype, torch.float32)):
            return None
        kinds.add(("rms" if type(norm) is RMSNorm else "layer", norm.eps, weight.dtype))
    if len(kinds) > 1:
        return None
    kind, eps, _ = kinds.pop() if kinds else ("none", 0.0, None)
    weights = [None if norm is None else norm.weight for norm in norms]
    return StreamNorms(weights, [getattr(norm, "bias", None) for norm in norms], kind, eps)
