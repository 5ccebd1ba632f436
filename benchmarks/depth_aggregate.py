"""Aggregation over depth, forward and backward: ours beside eager PyTorch and torch.compile, and the floor in bytes.

The floor counts passes over one [tokens, D] tensor ("units"), at the speed of copying as many bytes:
    forward S + C;  backward 2S + C (sources, dY, gradients);  chained backward 3S + C (and the incoming gradients).
Eager and torch.compile are each given the better of two formulations (a sum over sources, one product over a stack),
and are not charged for the S additions with which autograd joins the gradients of different layers; `chained` includes
them.

    python benchmarks/depth_aggregate.py --csv benchmarks/results/cpu_depth_aggregate.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Figure, check_outputs, measure_shapes, result_rows, row_names
from torch import Tensor

from muddformer import ops, reference

WAYS = 4


def units(sources: int, kind: str) -> int:
    """Passes over one hidden state that a figure cannot do without."""
    forward = sources + WAYS
    return {"forward": forward, "both": forward + 2 * sources + WAYS, "chained": forward + 3 * sources + WAYS}[kind]


def forward_backward(function: Callable, hiddens: list[Tensor], weights: Tensor, grads: list[Tensor]) -> Callable:
    """One call: the forward, then the gradients of all hidden states and of the weights."""

    def call() -> object:
        return torch.autograd.grad(function(hiddens, weights), [*hiddens, weights], grads)

    return call


def chained(hiddens: list[Tensor], weights: Tensor, grads: list[Tensor], incoming: list[Tensor]) -> Callable:
    """The same with the gradients that later layers have accumulated joined in."""

    def call() -> object:
        streams, handed_on = ops.depth_aggregate_chained(hiddens, weights)
        return torch.autograd.grad([*streams, *handed_on], [*hiddens, weights], [*grads, *incoming])

    return call


def check(hiddens: list[Tensor], weights: Tensor, functions: dict[str, Callable]) -> None:
    """Every formulation computes the same, on 64 tokens against float64."""
    few = [x[:64] for x in hiddens], weights[:64]
    expected = reference.depth_aggregate([x.double() for x in few[0]], few[1].double())
    for name, function in functions.items():
        check_outputs(name, function(*few), expected, weights.dtype)


def measure(
    tokens: int, width: int, sources: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_()  # noqa: E731
    hiddens, weights = [leaf(tokens, width) for _ in range(sources)], leaf(tokens, WAYS, sources)
    grads = [torch.randn_like(hiddens[0]) for _ in range(WAYS)]
    incoming = [torch.randn_like(hiddens[0]) for _ in range(sources)]
    torch._dynamo.reset()
    naive = [reference.depth_aggregate, reference.depth_aggregate_einsum]
    forms = {
        "eager": naive,
        "compile": [torch.compile(f, fullgraph=True) for f in naive],
        "ours": [ops.depth_aggregate],
    }
    forms = {method: forms[method] for method in methods}
    check(hiddens, weights, {f"{k} {i}": f for k, fs in forms.items() for i, f in enumerate(fs)})
    unit = tokens * width * hiddens[0].element_size()

    def figure(method: str, kind: str, calls: list[Callable]) -> Figure:
        names = row_names("depth_aggregate", method, kind, dtype, tokens, width, sources, WAYS)
        return Figure(names, calls, units(sources, kind) * unit)

    figures = []
    for method, functions in forms.items():
        figures.append(figure(method, "forward", [torch.no_grad()(lambda f=f: f(hiddens, weights)) for f in functions]))
        figures.append(figure(method, "both", [forward_backward(f, hiddens, weights, grads) for f in functions]))
    if "ours" in methods:
        figures.append(figure("ours", "chained", [chained(hiddens, weights, grads, incoming)]))
    return result_rows(figures, tokens * width * (sources + WAYS) // 2, dtype, device, seconds)


if __name__ == "__main__":
    measure_shapes(
        __doc__.split("\n")[0],
        measure,
        sources=[5, 13, 25],
        shapes=["1024x512", "2048x1024"],
        dtypes=["float32", "bfloat16"],
    )
