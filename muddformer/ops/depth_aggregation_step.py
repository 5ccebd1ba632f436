"""A whole layer of connections for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import call, check_kind, constant, kind_of
from .depth_aggregate_norm import StreamNorms

__all__ = ["depth_aggregation_step", "fuses_step"]


def depth_aggregation_step(
    hiddens: Sequence[Tensor],
    w1: Tensor | None,
    w2: Tensor | None,
    prior: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gelu_approximate: str = "none",
    cap: float | None = None,
    norms: StreamNorms | None = None,
    norm_weights: Sequence[Tensor | None] = (),
    norm_biases: Sequence[Tensor | None] = (),
    norm: str = "none",
    norm_eps: float = 1e-6,
) -> list[Tensor]:
    """A whole layer of connections for decoding: weights, aggregation and the norms of the streams, without gradients.

    ``A = GELU(RMSNorm(hiddens[-1]) w1^T) w2^T + prior`` (Eq. 6 to 8; without ``w1`` and ``w2``: ``A = prior``), then
    ``Y_c = norm_c(sum_j A[..., c, j, None] * hiddens[j])``. One kernel, which a CUDA graph can capture, where
    :func:`fuses_step` says so; otherwise composed of :func:`connection_weights`, :func:`depth_aggregate` and PyTorch's
    norms.

    Args:
        hiddens: the S sources X_j, each [..., D], of one shape, dtype and device; the newest is the last.
        w1, w2, scale, eps, gelu_approximate, cap: see :func:`connection_weights`; both ``w1`` and ``w2`` None for a
            static layer.
        prior: static prior [C, S], of the dtype of the hidden states or float32.
        norms: the streams' norms, without ``add_newest``, ``pre_weight`` and ``post_weight``; weights and biases may be
            empty. In place of the four arguments that follow, its ``weights``, ``biases``, ``kind`` and ``eps``.

    Returns:
        The C streams, each [..., D], new tensors.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if gradients are enabled and an argument requires one.
    """
    if norms is None:
        norms = StreamNorms(norm_weights, norm_biases, norm, norm_eps)
    elif not isinstance(norms, StreamNorms):
        raise TypeError(f"norms: expected a StreamNorms or None, got {kind_of(norms)}")
    elif (norm, norm_eps) != ("none", 1e-6) or len(norm_weights) or len(norm_biases):
        raise ValueError("norms: expected no other argument of the norms beside a StreamNorms, got some")
    extra = {"add_newest": norms.add_newest or None, "pre_weight": norms.pre_weight, "post_weight": norms.post_weight}
    given = [name for name, value in extra.items() if value is not None]
    if given:
        raise ValueError(f"norms: expected none of {', '.join(extra)} in a step, got {', '.join(given)}")
    return call(
        torch.ops.muddformer.depth_aggregation_step.default,
        hiddens,
        w1,
        w2,
        prior,
        scale,
        eps,
        gelu_approximate,
        cap,
        norms.weights,
        () if norms.biases is None else norms.biases,
        norms.kind,
        norms.eps,
    )


@constant
def _step_tokens(device: torch.device, dtype: torch.dtype) -> int:
    return torch.ops.muddformer.step_tokens(torch.empty(0, 1, device=device, dtype=dtype))


def fuses_step(newest: Tensor) -> bool:
    """Whether :func:`depth_aggregation_step` is one kernel for tokens like these.

    It is on CUDA (compute capability 9.0 or newer, and code for it in this build), not of float64, for no more than 64
    tokens. Beyond that cuBLAS's products are the better choice, or there is no kernel.

    Args:
        newest: the newest hidden state [..., D].
    """
    if not isinstance(newest, Tensor):
        check_kind("newest", newest, "Tensor")
    most = _step_tokens(newest.device, newest.dtype)  # a constant to torch.compile: the number of tokens may be open
    return most > 0 and newest.numel() <= most * newest.shape[-1]
