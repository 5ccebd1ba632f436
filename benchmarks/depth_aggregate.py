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
from common import copy_gb_per_s, median_ms, parser, peak_memory_mib, reference, write_rows
from torch import Tensor

from muddformer import ops

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


def check(hiddens: list[Tensor], weights: Tensor, functions: dict[str, Callable], tolerance: float) -> None:
    """Every formulation computes the same, on 64 tokens against float64."""
    few = [x[:64] for x in hiddens], weights[:64]
    expected = reference.depth_aggregate([x.double() for x in few[0]], few[1].double())
    for name, function in functions.items():
        for y, z in zip(function(*few), expected, strict=True):
            error = ((y.double() - z).abs().max() / z.abs().max()).item()
            assert error < tolerance, f"{name}: relative error {error}"


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
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    check(hiddens, weights, {f"{k} {i}": f for k, fs in forms.items() for i, f in enumerate(fs)}, tolerance)
    unit = tokens * width * hiddens[0].element_size()
    speed = copy_gb_per_s(tokens * width * (sources + WAYS) // 2, dtype, device, seconds)

    def row(method: str, kind: str, calls: list[Callable]) -> dict:
        ms, best = min(((median_ms(call, device, seconds), call) for call in calls), key=lambda pair: pair[0])
        moved = units(sources, kind) * unit
        memory = peak_memory_mib(best, device)
        return {
            "op": "depth_aggregate",
            "method": method,
            "kind": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "D": width,
            "S": sources,
            "C": WAYS,
            "ms": round(ms, 4),
            "gb_per_s": round(moved / ms / 1e6, 1),
            "floor_ms": round(moved / speed / 1e6, 4),
            "fraction_of_floor": round(moved / speed / 1e6 / ms, 3),
            "peak_mib": "" if memory is None else round(memory, 1),
        }

    rows = []
    for method, functions in forms.items():
        with torch.no_grad():
            rows.append(row(method, "forward", [lambda f=f: f(hiddens, weights) for f in functions]))
        rows.append(row(method, "both", [forward_backward(f, hiddens, weights, grads) for f in functions]))
    if "ours" in methods:
        rows.append(row("ours", "chained", [chained(hiddens, weights, grads, incoming)]))
    return rows


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--sources", type=int, nargs="+", default=[5, 13, 25], help="numbers of sources S")
    p.add_argument("--shapes", nargs="+", default=["1024x512", "2048x1024"], help="tokens x D")
    p.add_argument("--methods", nargs="+", default=["eager", "compile", "ours"], help="what to measure")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="names of torch dtypes")
    args = p.parse_args()
    device = torch.device(args.device)
    print("      shape     dtype   S   method     kind        ms    floor of floor    GB/s")
    for dtype in args.dtypes:
        for shape in args.shapes:
            tokens, width = map(int, shape.split("x"))
            for sources in args.sources:
                rows = measure(tokens, width, sources, getattr(torch, dtype), device, args.seconds, args.methods)
                for r in rows:
                    print(
                        f"{shape:>11} {dtype:>9} {sources:>3} {r['method']:>8} {r['kind']:>8} {r['ms']:>9.3f} "
                        f"{r['floor_ms']:>8.3f} {r['fraction_of_floor']:>8.3f} {r['gb_per_s']:>7.1f}",
                        flush=True,
                    )
                write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
