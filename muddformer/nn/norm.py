"""Norms over the model width D, and what the aggregation needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_integer, check_real
from ..ops import StreamNorms

__all__ = [
    "RMSNorm",
    "as_stream_norms",
    "autocast_dtype",
    "check_norms",
    "is_plain",
    "plain_parameters",
    "register_norm",
]

_ORDINARY = (Tensor, nn.Parameter)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension [D], in the dtype of ``x``.

    Unlike torch.nn.RMSNorm, a float32 weight meets a bfloat16 input (as under autocast) in the fused kernel.

    Args:
        dim: width D.
        eps: added to the mean square, more than 0 and at most 1.
        init: value of a fresh weight.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, dim: int, eps: float = 1e-6, *, init: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = check_real("eps", eps, 0.0, 1.0)
        self.init = init
        self.weight = nn.Parameter(torch.empty(check_integer("dim", dim), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ``init``."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


# The norms that operators can make, by class: their kind, and what they call their epsilon.
_NORMS: dict[type[nn.Module], tuple[str, str]] = {RMSNorm: ("rms", "eps"), nn.LayerNorm: ("layer", "eps")}


def register_norm(cls: type[nn.Module], kind: str, eps: str = "eps") -> None:
    """Says that operators can make the norms of a class instead of calling them.

    Args:
        cls: the class; subclasses do not count. Its weight (and bias) are [D].
        kind: the formula, ``"rms"`` as in :class:`RMSNorm` or ``"layer"`` as in torch.nn.LayerNorm.
        eps: name of the attribute that is added to the mean square.
    """
    _NORMS[cls] = kind, eps


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives ``x`` in an operator, None where it leaves ``x`` as it is."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is of one of these very classes, without hooks and without another ``forward``."""
    if type(module) not in types or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return not (module._backward_hooks or module._backward_pre_hooks)


def plain_parameters(module: nn.Module, x: Tensor, *types: type[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a module that an operator may read instead of calling it, the bias None where it is left out.

    Args:
        x: another tensor that the operator takes, such as the hidden state.
        types: the classes whose formula the operator knows.

    Returns:
        None if the module has to be called: it is of none of these very classes, has hooks or another ``forward``, or
        parameters that are neither ordinary tensors nor of the class of ``x`` (an adapter, a quantised or a
        parametrised module, one whose weights are sharded over devices).
    """
    if not is_plain(module, *types):
        return None
    # Not by getattr, which takes long. FSDP1 puts tensors in the places of parameters.
    own = module.__dict__
    parameters = own["_parameters"]
    if "weight" not in parameters:
        parameters = own
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (type(weight) not in _ORDINARY and type(weight) is not type(x)) or weight.layout is not torch.strided:
        return None
    if bias is not None and type(bias) not in _ORDINARY and type(bias) is not type(x):
        return None
    return weight, bias


def check_norms(name: str, norms: Sequence[nn.Module | None] | None, count: int) -> list[nn.Module | None]:
    """The norms of ``count`` streams, a list of None where there are none.

    Args:
        name: of the argument, for errors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if norms is None:
        return [None] * count
    if not isinstance(norms, Sequence | nn.ModuleList):
        raise TypeError(f"{name} must be a list of norms, got a value of type {type(norms).__name__}")
    if len(norms) != count:
        raise ValueError(f"{name} must have {count} entries, got {len(norms)}")
    for i, norm in enumerate(norms):
        if norm is not None and not callable(norm):
            raise TypeError(f"{name}[{i}] must be a norm or None, got a value of type {type(norm).__name__}")
    return list(norms)


def as_stream_norms(norms: Sequence[nn.Module | None], x: Tensor) -> StreamNorms | None:
    """These norms as the operators take them.

    Args:
        norms: None stands for a way without a norm.
        x: a hidden state [..., D].

    Returns:
        None if the operators cannot take them. They can if all are RMSNorm or all LayerNorm, or of a class that
        was registered as such (:func:`register_norm`), plain ones (:func:`plain_parameters`), of one eps and with
        parameters [D] of one dtype, that of ``x`` or float32.
    """
    weights: list[Tensor | None] = [None] * len(norms)
    biases: list[Tensor | None] = [None] * len(norms)
    common: tuple[Any, ...] = ("none", 0.0)  # compared as a whole: attributes of tensors take long
    for way, norm in enumerate(norms):
        if norm is None:
            continue
        parameters = plain_parameters(norm, x, *_NORMS)
        if parameters is None:
            return None
        weight, bias = parameters
        formula, epsilon = _NORMS[type(norm)]
        if formula == "rms" and bias is not None:
            return None
        own = formula, getattr(norm, epsilon), weight.dtype, weight.shape, weight.device
        if common[0] == "none":
            common = own
            if own[3:] != (x.shape[-1:], x.device):
                return None
            if own[2] not in (torch.float32, x.dtype) and autocast_dtype(x) is None:
                return None
        elif own != common:
            return None
        if bias is not None and (bias.dtype, bias.shape, bias.device) != own[2:]:
            return None
        weights[way], biases[way] = weight, bias
    return StreamNorms(weights, biases, common[0], common[1])
