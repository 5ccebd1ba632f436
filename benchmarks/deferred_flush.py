"""Deferred gradients of older hidden states: the pass that adds them up, and what a group of layers gains by it.

S is the number of older hidden states, a group has four layers of four ways. The floor counts passes over one
[tokens, D] tensor ("units"), at the speed of copying as many bytes:
    flush     2S + 16 (incoming gradients, results, and the factors)
    group     the chained backwards of the four layers, S + 1 .. S + 4 sources each: (sources) + 2 (those not older) + 4
              each, and the flush; "single" is the same group with every layer adding to every gradient.

    python benchmarks/deferred_flush.py --csv benchmarks/results/h100_deferred_flush.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Figure, check_outputs, measure_shapes, result_rows, row_names
from torch import Tensor

import muddformer.ops  # noqa: F401  (registers the operators)
from muddformer import reference

WAYS, LAYERS = 4, 4
OPS = torch.ops.muddformer


def units(older: int, kind: str, method: str) -> int:
    """Passes over one hidden state that a figure cannot do without."""
    flush = 2 * older + WAYS * LAYERS
    if kind == "flush":
        return flush
    young = range(1, LAYERS + 1)
    if method == "single":
        return sum(3 * (older + n) + WAYS for n in young)
    return sum(older + 3 * n + WAYS for n in young) + flush


def group(hiddens: list[Tensor], sums: list[Tensor], weights: list[Tensor], incoming: list[Tensor], older: int) -> None:
    """The backwards of a group's layers from the last to the first; ``older`` = 0: each adds to every gradient."""
    grads = incoming
    for i in reversed(range(LAYERS)):
        sources = weights[i].shape[-1]
        given = [*[None] * older, *grads[older:sources]]
        dy = sums[WAYS * i : WAYS * (i + 1)]
        own, _ = OPS.depth_aggregate_backward(dy, given, hiddens[:sources], weights[i], older)
        grads = [*grads[:older], *own]
    if older:
        OPS.deferred_flush(grads[:older], sums, weights)


def measure(
    tokens: int, width: int, older: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    hiddens, incoming = ([make(tokens, width) for _ in range(older + LAYERS)] for _ in range(2))
    sums = [make(tokens, width) for _ in range(WAYS * LAYERS)]
    weights = [make(tokens, WAYS, older + 1 + i) for i in range(LAYERS)]
    torch._dynamo.reset()
    forms = {
        "eager": reference.deferred_flush,
        "compile": torch.compile(reference.deferred_flush, fullgraph=True),
        "ours": OPS.deferred_flush,
    }
    forms = {method: forms[method] for method in methods}
    few = [t[:64] for t in incoming[:older]], [t[:64] for t in sums], [t[:64] for t in weights]
    expected = reference.deferred_flush(*([t.double() for t in tensors] for tensors in few))
    for name, function in forms.items():
        check_outputs(name, function(*few), expected, dtype)
    unit = tokens * width * hiddens[0].element_size()

    def figure(method: str, kind: str, call: Callable) -> Figure:
        names = {**row_names("deferred_flush", method, kind, dtype, tokens, width, older, WAYS), "layers": LAYERS}
        return Figure(names, [call], units(older, kind, method) * unit)

    flush = {m: lambda m=m: forms[m](incoming[:older], sums, weights) for m in forms}
    figures = [figure(method, "flush", call) for method, call in flush.items()]
    if "ours" in methods:
        figures.append(figure("single", "group", lambda: group(hiddens, sums, weights, incoming, 0)))
        figures.append(figure("ours", "group", lambda: group(hiddens, sums, weights, incoming, older)))
    return result_rows(figures, tokens * width * (older + 2 * WAYS), dtype, device, seconds)


if __name__ == "__main__":
    measure_shapes(
        __doc__.split("\n")[0],
        measure,
        sources=[5, 9, 13, 17, 21, 29],
        shapes=["16384x1024", "8192x2048"],
        dtypes=["bfloat16"],
    )
