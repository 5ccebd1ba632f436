"""Aggregation over depth with normed streams: ours beside eager PyTorch and torch.compile, and the floor in bytes.

Norms: those of the q, k and v streams, and with them none of the hidden states ("qkv"), PreDANorm's ("pre"),
PostDANorm's ("post") or both. The floor counts passes over one [tokens, D] tensor, at the speed of copying as many
bytes, with one more for what a pre-norm and a post-norm each keep for the backward:
    forward S + C;  backward 3S + C + 3 (sources, incoming gradients, gradients, dY, normed streams);
    deferred: the backward of a layer whose first S - 3 sources get their gradients later (deferred_flush.py).
Eager and torch.compile are not charged for the S additions that join the gradients of different layers.

    python benchmarks/depth_aggregate_norm.py --csv benchmarks/results/h100_depth_aggregate_norm.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Figure, check_outputs, measure_shapes, result_rows, row_names
from torch import Tensor

from muddformer import ops, reference

WAYS, NORMED, KEPT = 4, 3, 3
EPS = 1e-6
OPS = torch.ops.muddformer


def units(sources: int, kind: str, pre: bool, post: bool) -> int:
    """Passes over one hidden state that a figure cannot do without."""
    forward = sources + WAYS + pre + post
    backward = 3 * sources + WAYS + NORMED + post
    deferred = backward - 2 * (sources - KEPT) + NORMED + post
    return {"forward": forward, "backward": backward, "deferred": deferred, "both": forward + backward}[kind]


def gradients(function: Callable, leaves: list[Tensor], grads: list[Tensor]) -> Callable:
    """One call: the forward, then the gradients of all leaves."""

    def call() -> object:
        streams, handed_on = function()
        return torch.autograd.grad([*streams, *handed_on], leaves, grads[: len(streams) + len(handed_on)])

    return call


def measure(
    tokens: int, width: int, sources: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape, with all kinds of norms."""
    rows = []
    for norms in ("qkv", "pre", "post", "pre-post"):
        rows += measure_norms(norms, tokens, width, sources, dtype, device, seconds, methods)
    return rows


def measure_norms(
    norms: str,
    tokens: int,
    width: int,
    sources: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    methods: list[str],
) -> list[dict]:
    """Rows of one shape and one kind of norms."""
    torch.manual_seed(0)
    pre, post = "pre" in norms, "post" in norms
    leaf = lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_()  # noqa: E731
    scale = lambda size=1.0: (size + 0.1 * torch.randn(width, device=device)).requires_grad_()  # noqa: E731
    hiddens, weights = [leaf(tokens, width) for _ in range(sources)], leaf(tokens, WAYS, sources)
    norm_weights = [*(scale() for _ in range(NORMED)), None]
    options = {"add_newest": post, "pre_weight": scale() if pre else None, "post_weight": scale(0.1) if post else None}
    grads = [torch.randn_like(hiddens[0]) for _ in range(WAYS + sources)]
    leaves = [*hiddens, weights, *norm_weights[:NORMED], *(t for t in options.values() if isinstance(t, Tensor))]
    no_biases = [None] * WAYS

    def naive(hiddens: list[Tensor], weights: Tensor) -> list[Tensor]:
        return reference.depth_aggregate_norm(hiddens, weights, norm_weights, no_biases, eps=EPS, **options)[0]

    def ours(hiddens: list[Tensor], weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return ops.depth_aggregate_norm_chained(hiddens, weights, norm_weights, eps=EPS, **options)

    torch._dynamo.reset()
    compiled = torch.compile(naive, fullgraph=True)
    forms = {"eager": lambda h, w: (naive(h, w), []), "compile": lambda h, w: (compiled(h, w), []), "ours": ours}
    forms = {method: forms[method] for method in methods}
    with torch.no_grad():
        few = [x[:64] for x in hiddens], weights[:64]
        expected = naive([x.double() for x in few[0]], few[1].double())
        for method, function in forms.items():
            check_outputs(method, function(*few)[0], expected, dtype)
    unit = tokens * width * hiddens[0].element_size()

    def figure(method: str, kind: str, call: Callable) -> Figure:
        names = {**row_names("depth_aggregate_norm", method, kind, dtype, tokens, width, sources, WAYS), "norms": norms}
        return Figure(names, [call], units(sources, kind, pre, post) * unit)

    figures = []
    for method, function in forms.items():
        figures.append(figure(method, "forward", torch.no_grad()(lambda f=function: f(hiddens, weights))))
        figures.append(figure(method, "both", gradients(lambda f=function: f(hiddens, weights), leaves, grads)))
    if "ours" in methods:
        given = hiddens, weights, norm_weights, no_biases, "rms", EPS, *options.values()
        with torch.no_grad():
            streams, _, mix, statistics = OPS.depth_aggregate_norm_forward(*given)

        def backward(deferred: int) -> Callable:
            incoming = [*[None] * deferred, *grads[WAYS + deferred :]]
            saved = *given, streams, mix, statistics, deferred
            return torch.no_grad()(lambda: OPS.depth_aggregate_norm_backward(grads[:WAYS], incoming, *saved))

        figures.append(figure("ours", "backward", backward(0)))
        figures.append(figure("ours", "deferred", backward(sources - KEPT)))
    return result_rows(figures, tokens * width * (sources + WAYS) // 2, dtype, device, seconds)


if __name__ == "__main__":
    measure_shapes(
        __doc__.split("\n")[0],
        measure,
        sources=[9, 17, 33],
        shapes=["16384x1024", "8192x2048", "8192x2560", "4096x4096"],
        dtypes=["bfloat16"],
    )
