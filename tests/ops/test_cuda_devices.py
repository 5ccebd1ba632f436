"""All operators on a stream of their own, and on a device that is not the current one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.op_samples import DTYPES
from muddformer import ops

pytestmark = pytest.mark.cuda
WIDTHS = [30, 256]  # the scalar and the vector kernels


def inputs(width: int, dtype: torch.dtype) -> list[Tensor]:
    """Five hidden states, W1, W2, the prior and a norm's weight, on the first CUDA device."""
    shapes = [*[(3, 5, width)] * 5, (20, width), (20, 20), (4, 5), (width,)]
    return [0.2 * torch.randn(shape, device="cuda:0").to(dtype) for shape in shapes]


def everything(tensors: list[Tensor]) -> list[Tensor]:
    """What every operator makes of them, and the gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    *hiddens, w1, w2, prior, norm = leaves
    norms = [norm, norm, norm, None]
    weights = ops.connection_weights(hiddens[-1], w1, w2, prior)
    streams, handed_on = ops.depth_aggregate_chained(hiddens, weights)
    normed, _ = ops.depth_aggregate_norm_chained(handed_on, weights, norms)
    loss = ops.linear_cross_entropy(handed_on[0], w1, torch.arange(15, device=w1.device).view(3, 5), chunk=4)
    loss = loss + ops.linear(ops.linear(handed_on[1], w1), w2, residual=streams[0][..., :20]).square().mean()
    total, after = ops.add_norm(ops.swiglu(streams[0], streams[1]), streams[2], norm)
    heads = [x.unflatten(-1, (2, -1)) for x in (total, after)]
    angles = torch.linspace(0, 3, 5 * (norm.numel() // 4), device=norm.device).view(5, -1)
    turned = ops.qk_norm_rotary(*heads, angles.cos(), angles.sin(), *[norm[: heads[0].shape[-1]]] * 2)
    grads = torch.autograd.grad(loss + sum(y.square().mean() for y in [*streams, *normed, *turned]), leaves)
    with torch.no_grad():
        step = ops.depth_aggregation_step(hiddens, w1, w2, prior, norm="rms", norm_weights=norms)
        flushed = torch.ops.muddformer.deferred_flush(list(hiddens[:-1]), list(streams), [weights])
    results = [weights, loss, *streams, *normed, *turned, *grads, *step, *flushed]
    assert all(t.isfinite().all() for t in results)
    return results


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_current_stream(width: int, dtype: torch.dtype) -> None:
    """On another stream they read what that stream has written, however late."""
    tensors = inputs(width, dtype)
    expected = everything(tensors)
    late = [torch.full_like(t, torch.nan) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
        results = everything(late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_device(width: int, dtype: torch.dtype) -> None:
    tensors = inputs(width, dtype)
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two equal CUDA devices: sums are taken in an order of the device")
    expected = everything(tensors)
    results = everything([t.to("cuda:1") for t in tensors])
    assert torch.cuda.current_device() == 0
    for result, y in zip(results, expected, strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), y.cpu())
