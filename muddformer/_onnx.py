"""The operators as formulas of PyTorch's own, for torch.onnx.export(dynamo=True).

The exporter takes decompositions from a table of PyTorch's that tracing with symbolic sizes reads too. So they are put
there when ONNX is about to be written, which needs onnxscript.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition

from . import _library, reference  # noqa: F401  (loads libmuddformer, which registers the operators)
from ._imports import when_imported

__all__: list[str] = []


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _depth_aggregate(hiddens: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """As one product [C, S] x [S, D] a token: a node in place of C * S."""
    return [y.contiguous() for y in (weights @ torch.stack(list(hiddens), -2)).unbind(-2)]


def _norm(v: Tensor, eps: float, layer: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What is normed, before any weight, with mean and factor."""
    mean = v.mean(-1, keepdim=True) if layer else torch.zeros_like(v[..., :1])
    factor = torch.rsqrt((v - mean).square().mean(-1, keepdim=True) + eps)
    return (v - mean) * factor, mean, factor


def _depth_aggregate_norm_forward(
    hiddens: Sequence[Tensor],
    weights: Tensor,
    norm_weights: Sequence[Tensor | None],
    norm_biases: Sequence[Tensor | None],
    norm: str,
    eps: float,
    add_newest: bool,
    pre_weight: Tensor | None,
    post_weight: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    newest, dtype = hiddens[-1], hiddens[-1].dtype
    base = newest.to(_wide(dtype))
    mixed = mix = newest.new_empty(0)
    means, factors = [], []
    if pre_weight is not None:
        normed, *pre_statistics = _norm(base, eps)
        mixed = (normed * pre_weight).to(dtype)
        hiddens = [*hiddens[:-1], mixed]
    streams = []
    for c, (y, weight, bias) in enumerate(
        zip(_depth_aggregate(hiddens, weights), norm_weights, norm_biases, strict=True)
    ):
        post = post_weight is not None and c + 1 == len(norm_weights)
        weight, mix = (post_weight, y) if post else (weight, mix)
        v = y.to(base.dtype) + base if add_newest and not post else y.to(base.dtype)
        mean, factor = torch.zeros_like(base[..., :1]), torch.ones_like(base[..., :1])
        if weight is not None:
            v, mean, factor = _norm(v, eps, norm == "layer" and not post)
            v = v * weight if bias is None else v * weight + bias
        streams.append((v + base if post else v).to(dtype))
        means.append(mean)
        factors.append(factor)
    if pre_weight is not None:
        means.append(pre_statistics[0])
        factors.append(pre_statistics[1])
    return streams, mixed, mix.clone(), torch.stack([*means, *factors]).reshape(2, len(means), -1)


def _connection_weights(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    prior: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gelu_approximate: str = "none",
    cap: float | None = None,
) -> Tensor:
    return reference.connection_weights(
        x, w1, w2, prior, scale=scale, eps=eps, gelu_approximate=gelu_approximate, cap=cap
    )


def _depth_aggregation_step(
    hiddens: Sequence[Tensor],
    w1: Tensor | None,
    w2: Tensor | None,
    prior: Tensor,
    scale: Tensor | None,
    eps: float,
    gelu_approximate: str,
    cap: float | None,
    norm_weights: Sequence[Tensor | None],
    norm_biases: Sequence[Tensor | None],
    norm: str,
    norm_eps: float,
) -> list[Tensor]:
    x = hiddens[-1]
    if w1 is None or w2 is None:
        a = prior if cap is None else cap * torch.tanh(prior / cap)
        weights = a.to(x.dtype).expand(*x.shape[:-1], *prior.shape)
    else:
        weights = _connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap)
    none = [None] * len(prior)
    streams, *_ = _depth_aggregate_norm_forward(
        hiddens, weights, norm_weights or none, norm_biases or none, norm, norm_eps, False, None, None
    )
    return streams


def _linear_cross_entropy_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grad_losses: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    _: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits.to(_wide(hidden.dtype))
    counts = targets != ignore_index
    target = F.one_hot(torch.where(counts, targets, 0).long(), weight.shape[0]).to(logits.dtype)
    target = target * (1 - label_smoothing) + label_smoothing / weight.shape[0]
    size = logits.logsumexp(-1, keepdim=True)
    losses = ((size - (target * logits).sum(-1, keepdim=True) + z_loss * size.square()).squeeze(-1)) * counts
    g = (torch.softmax(logits, -1) * (1 + 2 * z_loss * size) - target) * counts.unsqueeze(-1)
    g = g if grad_losses is None else g * grad_losses.unsqueeze(-1)
    rows, none = g.flatten(0, -2), logits.new_empty(0)
    return (
        losses,
        g @ weight.to(g.dtype) if wanted[0] else none,
        rows.mT @ hidden.flatten(0, -2).to(g.dtype) if wanted[1] else none.clone(),
        rows.sum(0) if wanted[2] else none.clone(),
    )


def _add_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = residual + x
    normed, mean, factor = _norm(total.to(_wide(total.dtype)), eps, norm == "layer")
    normed = normed * weight if bias is None else normed * weight + bias
    means = mean.squeeze(-1) if norm == "layer" else factor.new_empty(0)
    return total, normed.to(dtype or total.dtype), factor.squeeze(-1), means


def _qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rotary(q, k, cos, sin, q_weight, k_weight, eps=eps)


FORMULAS = {
    "add_norm_forward": _add_norm_forward,
    "connection_weights": _connection_weights,
    "depth_aggregate": _depth_aggregate,
    "depth_aggregate_norm_forward": _depth_aggregate_norm_forward,
    "depth_aggregation_step": _depth_aggregation_step,
    "linear_forward": reference.linear,
    "linear_cross_entropy_losses": _linear_cross_entropy_losses,
    "qk_norm_rotary": _qk_norm_rotary,
    "swiglu": reference.swiglu,
}


def _register(_: Any) -> None:
    for name, formula in FORMULAS.items():
        register_decomposition(getattr(torch.ops.muddformer, name).default)(formula)


when_imported("onnxscript", _register)
