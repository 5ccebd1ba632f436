"""One call of every operator, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from muddformer import ops


def inputs(leading: tuple[int, int], width: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Five hidden states, W1, W2, the prior and a norm's weight."""
    shapes = [*[(*leading, width)] * 5, (20, width), (20, 20), (4, 5), (width,)]
    return [0.2 * torch.randn(shape, device=device).to(dtype) for shape in shapes]


def outputs(leaves: list[Tensor]) -> list[Tensor]:
    """What the operators with gradients make of them."""
    *hiddens, w1, w2, prior, norm = leaves
    batch, length = hiddens[0].shape[:2]
    norms = [norm, norm, norm, None]
    weights, newest = ops.connection_weights_chained(hiddens[-1], w1, w2, prior, cap=9.0)
    older, deferrals = ops.defer_gradients(hiddens[:-1], [(4, 5)])
    streams, handed_on = ops.depth_aggregate_chained([*older, newest], weights, deferrals[0])
    normed, handed_on = ops.depth_aggregate_norm_chained(handed_on, weights, norms)
    targets = torch.arange(batch * length, device=w1.device).view(batch, length) % len(w1)
    loss = ops.linear_cross_entropy(handed_on[0], w1, targets, chunk=4)
    product = ops.linear(ops.linear(handed_on[1], w1), w2, residual=streams[0][..., :20])
    total, after = ops.add_norm(ops.swiglu(streams[0], streams[1]), streams[2], norm)
    heads = [x.unflatten(-1, (2, x.shape[-1] // 2)) for x in (total, after)]
    angles = torch.linspace(0, 3, length * (norm.numel() // 4), device=norm.device).view(length, norm.numel() // 4)
    turned = ops.qk_norm_rotary(*heads, angles.cos(), angles.sin(), *[norm[: heads[0].shape[-1]]] * 2)
    return [weights, loss, product, *streams, *normed, *turned]


def everything(tensors: list[Tensor]) -> list[Tensor]:
    """The outputs, the gradients, and what has none."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    *hiddens, w1, w2, prior, norm = leaves
    made = outputs(leaves)
    grads = torch.autograd.grad(sum(y.square().sum() for y in made[1:]), leaves)
    with torch.no_grad():
        step = ops.depth_aggregation_step(hiddens, w1, w2, prior, norm="rms", norm_weights=[norm, norm, norm, None])
        flushed = torch.ops.muddformer.deferred_flush(list(hiddens[:-1]), list(made[3:7]), [made[0]])
    results = [*made, *grads, *step, *flushed]
    assert all(t.isfinite().all() for t in results)
    return [t.detach() for t in results]
