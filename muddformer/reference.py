"""The formula of every operator in plain PyTorch, as one writes it from the paper.

Tests and benchmarks compare the operators with it. See :mod:`muddformer.nn.naive` for whole layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def depth_aggregate(hiddens: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Y_c = sum_j weights[..., c, j, None] * hiddens[j], in the dtype of the inputs."""
    ways, sources = weights.shape[-2:]
    return [sum(weights[..., c, j, None] * hiddens[j] for j in range(sources)) for c in range(ways)]


def depth_aggregate_einsum(hiddens: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """The same through one stacked tensor and one product: the other way that users write it."""
    return list(torch.einsum("...cs,s...d->c...d", weights, torch.stack(list(hiddens))).unbind(0))


def connection_weights(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    prior: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gelu_approximate: str = "none",
    cap: float | None = None,
) -> Tensor:
    """A = GELU(RMSNorm(x) w1^T) w2^T + prior, optionally cap * tanh(A / cap)."""
    normed = F.rms_norm(x, (x.shape[-1],), None if scale is None else scale.to(x.dtype), eps)
    a = F.linear(F.gelu(F.linear(normed, w1), approximate=gelu_approximate), w2)
    a = a.unflatten(-1, prior.shape) + prior.to(x.dtype)
    return a if cap is None else cap * torch.tanh(a / cap)


def depth_aggregate_norm(
    hiddens: Sequence[Tensor],
    weights: Tensor,
    norm_weights: Sequence[Tensor | None],
    norm_biases: Sequence[Tensor | None],
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    add_newest: bool = False,
    pre_weight: Tensor | None = None,
    post_weight: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Y_c = norm_c(base + mix_c), the last way base + RMSNorm(mix_c) * post_weight if there is a post weight; base is
    the newest hidden state or 0. And the hidden states: the newest is normed first if there is a pre weight.
    """
    newest = hiddens[-1]
    shape = newest.shape[-1:]
    if pre_weight is not None:
        hiddens = [*hiddens[:-1], F.rms_norm(newest, shape, pre_weight.to(newest.dtype), eps)]
    streams = depth_aggregate(hiddens, weights)
    if post_weight is not None:
        streams[-1] = F.rms_norm(streams[-1], shape, post_weight.to(newest.dtype), eps)
    if add_newest:
        streams = [newest + y for y in streams]
    for c, (weight, bias) in enumerate(zip(norm_weights, norm_biases, strict=True)):
        if weight is not None:
            weight, y = weight.to(streams[c].dtype), streams[c]
            bias = None if bias is None else bias.to(y.dtype)
            streams[c] = (
                F.rms_norm(y, shape, weight, eps) if norm == "rms" else F.layer_norm(y, shape, weight, bias, eps)
            )
    return streams, list(hiddens)


def deferred_flush(
    grad_hiddens: Sequence[Tensor | None], grad_sums: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> list[Tensor]:
    """dX_j = G_j + sum over all layers i and ways c of weights_i[..., c, j, None] * dV_{i,c}; None stands for zero."""
    ways = [w[..., c, :] for w in weights for c in range(w.shape[-2])]
    terms = [(w, dv) for w, dv in zip(ways, grad_sums, strict=True) if dv is not None]
    return [
        sum((w[..., j, None] * dv for w, dv in terms), start=torch.zeros_like(terms[0][1]) if g is None else g)
        for j, g in enumerate(grad_hiddens)
    ]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x weight^T + bias + residual."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if residual is None else residual + y


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """cross_entropy(hidden weight^T + bias) + z_loss * logsumexp(logits)^2; ``chunk`` changes nothing."""
    logits = F.linear(hidden, weight, bias).reshape(-1, weight.shape[0])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = targets.flatten().long()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    counts = flat != ignore_index
    losses = F.cross_entropy(logits, flat, **options) + z_loss * logits.logsumexp(-1).square() * counts
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (counts.sum().clamp_min(1) if reduction == "mean" else 1)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up; without ``up`` gate and up are the halves of ``gate``."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + x, and its RMSNorm or LayerNorm."""
    y = residual + x
    shape, weight = y.shape[-1:], weight.to(y.dtype)
    bias = None if bias is None else bias.to(y.dtype)
    normed = F.rms_norm(y, shape, weight, eps) if norm == "rms" else F.layer_norm(y, shape, weight, bias, eps)
    return y, normed.to(dtype or y.dtype)


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
    """RMSNorm of every head if there are weights, and rotation of its first 2 * half entries."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def turn(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        parts = [(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest]
        return torch.cat(parts, -1)

    return turn(q, q_weight), turn(k, k_weight)
