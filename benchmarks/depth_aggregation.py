"""A whole DA layer (connection weights, aggregation, norms of the q, k and v streams), forward and backward.

Ours (muddformer.nn.DepthAggregation with stream norms) beside eager PyTorch and torch.compile, each given the better of
two formulations of the aggregation. The floor counts passes over one [tokens, D] tensor at the speed of copying:
    forward: S sources + C streams;  backward: S sources, C gradients, 3 normed streams, S gradients written.
The generator's own passes over the newest hidden state are small beside them and not counted.

    python benchmarks/depth_aggregation.py --csv benchmarks/results/h100_depth_aggregation.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Figure, check_outputs, measure_shapes, result_rows, row_names
from torch import Tensor

from muddformer import reference
from muddformer.nn import DepthAggregation, RMSNorm

WAYS = 4


def naive(aggregate: Callable, da: DepthAggregation, norms: list[RMSNorm], hiddens: list[Tensor]) -> list[Tensor]:
    """The layer in plain PyTorch."""
    weights = reference.connection_weights(hiddens[-1], da.w1.weight, da.w2.weight, da.prior, eps=da.eps)
    streams = list(aggregate(hiddens, weights))
    for c, norm in enumerate(norms):
        streams[c] = F.rms_norm(streams[c], norm.weight.shape, norm.weight, norm.eps)
    return streams


def measure(
    tokens: int, width: int, sources: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    da = DepthAggregation(width, sources, round64=True).to(device, dtype)
    torch.nn.init.normal_(da.w2.weight, std=0.02)
    norms = [RMSNorm(width).to(device, dtype) for _ in range(3)]
    hiddens = [torch.randn(tokens, width, device=device).to(dtype).requires_grad_() for _ in range(sources)]
    grads = [torch.randn_like(hiddens[0]) for _ in range(WAYS)]
    leaves = [*hiddens, *da.parameters(), *(norm.weight for norm in norms)]
    torch._dynamo.reset()
    forms = [
        lambda xs, a=a: naive(a, da, norms, xs) for a in (reference.depth_aggregate, reference.depth_aggregate_einsum)
    ]
    calls = {
        "eager": forms,
        "compile": [torch.compile(f, fullgraph=True) for f in forms],
        "ours": [lambda xs: da(xs, stream_norms=[*norms, None])[0]],
    }
    unit = tokens * width * hiddens[0].element_size()
    with torch.no_grad():
        exact = forms[0](hiddens)
        check_outputs("ours", calls["ours"][0](hiddens), exact, dtype)
        del exact

    figures = []
    for method in methods:
        for kind, units in (("forward", sources + WAYS), ("both", 3 * sources + 2 * WAYS + 3)):

            def both(function: Callable) -> Callable:
                return lambda: torch.autograd.grad(function(hiddens), leaves, grads)

            def forward(function: Callable) -> Callable:
                return torch.no_grad()(lambda: function(hiddens))

            wrapped = [(forward if kind == "forward" else both)(f) for f in calls[method]]
            names = row_names("depth_aggregation", method, kind, dtype, tokens, width, sources, WAYS)
            figures.append(Figure(names, wrapped, units * unit))
    return result_rows(figures, tokens * width * (sources + WAYS) // 2, dtype, device, seconds)


if __name__ == "__main__":
    measure_shapes(__doc__.split("\n")[0], measure, sources=[9, 17, 25, 33], shapes=["8192x2048"], dtypes=["bfloat16"])
