"""The elementwise steps of a block: swiglu, add_norm and qk_norm_rotary beside eager PyTorch and torch.compile.

D is the width that each is given: of gate and value, of the residual stream, of queries and of keys (heads of 64, 128
or 80 entries). The floor counts the bytes that must move, at the speed of copying as many:
    swiglu          forward 3 tensors, backward 5;
    add_norm        forward 4, backward 4; with a float32 residual stream that counts twice;
    qk_norm_rotary  forward 2 each of queries and keys, backward 3, without norms 2.

    python benchmarks/block_ops.py --csv benchmarks/results/h100_block_ops.csv
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import Figure, check_outputs, measure_shapes, result_rows, row_names
from torch import Tensor

from muddformer import ops, reference

HEAD_DIMS = {2048: 128, 2560: 80}


class Case(NamedTuple):
    """One operator with one kind of inputs."""

    op: str
    form: str
    tensors: list[Tensor | None]
    options: dict[str, object]
    forward: int  # bytes for each of tokens * D entries
    backward: int


def cases(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """All operators at one shape; made one by one, because together they are large."""
    size = dtype.itemsize

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    yield Case("swiglu", "apart", [make(tokens, width), make(tokens, width)], {}, 3 * size, 5 * size)
    yield Case("swiglu", "fused", [make(tokens, 2 * width), None], {}, 3 * size, 5 * size)
    weight = make(width, dtype=torch.float32)
    bias = make(width, dtype=torch.float32)
    rows = [make(tokens, width), make(tokens, width)]
    yield Case("add_norm", "rms", [*rows, weight], {}, 4 * size, 4 * size)
    yield Case("add_norm", "layer", [*rows, weight, bias], {"norm": "layer"}, 4 * size, 4 * size)
    if size == 2:
        stream = [make(tokens, width), make(tokens, width, dtype=torch.float32), weight]
        yield Case("add_norm", "rms-float32-stream", stream, {"dtype": dtype}, 12, 16)
    head_dim = HEAD_DIMS.get(width, 64)
    batch, heads = max(tokens // 2048, 1), width // head_dim
    angles = torch.rand(tokens // batch, head_dim // 2, device=device)
    q, k = (make(batch, tokens // batch, heads, head_dim) for _ in range(2))
    norms = [make(head_dim, dtype=torch.float32) for _ in range(2)]
    yield Case("qk_norm_rotary", "norms", [q, k, angles.cos(), angles.sin(), *norms], {}, 4 * size, 6 * size)
    yield Case("qk_norm_rotary", "no-norms", [q, k, angles.cos(), angles.sin()], {}, 4 * size, 4 * size)


def measure(
    tokens: int, width: int, _sources: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    rows = []
    for case in cases(tokens, width, dtype, device):
        rows += measure_case(case, tokens, width, dtype, device, seconds, methods)
    return rows


def measure_case(
    case: Case, tokens: int, width: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one operator."""
    naive = getattr(reference, case.op)
    torch._dynamo.reset()
    forms = {"eager": naive, "compile": torch.compile(naive, fullgraph=True), "ours": getattr(ops, case.op)}
    leaves = [t for t in case.tensors if t is not None and t.requires_grad]
    moved = tokens * width
    figures = []

    def figure(method: str, kind: str, call: Callable, each: int) -> Figure:
        names = {**row_names(case.op, method, kind, dtype, tokens, width, 1, 1), "norms": f"{case.op} {case.form}"}
        return Figure(names, [call], each * moved)

    wide = [t if t is None else t.detach().double() if t.requires_grad else t for t in case.tensors]
    wide_options = {**case.options, **({"dtype": torch.float64} if "dtype" in case.options else {})}
    expected = naive(*wide, **wide_options)
    expected = [expected] if isinstance(expected, Tensor) else expected
    for method in methods:

        def forward(function: Callable = forms[method]) -> list[Tensor]:
            results = function(*case.tensors, **case.options)
            return [results] if isinstance(results, Tensor) else list(results)

        with torch.no_grad():
            check_outputs(method, forward(), expected, dtype)
        results = forward()
        grads = [torch.randn_like(y) for y in results]

        def backward(results: list[Tensor] = results, grads: list[Tensor] = grads) -> object:
            return torch.autograd.grad(results, leaves, grads, retain_graph=True)

        def both(forward: Callable = forward, grads: list[Tensor] = grads) -> object:
            return torch.autograd.grad(forward(), leaves, grads)

        figures.append(figure(method, "forward", torch.no_grad()(forward), case.forward))
        figures.append(figure(method, "backward", backward, case.backward))
        figures.append(figure(method, "both", both, case.forward + case.backward))
    del wide, expected
    return result_rows(figures, 2 * moved, dtype, device, seconds)


if __name__ == "__main__":
    measure_shapes(
        __doc__.split("\n")[0],
        measure,
        sources=[1],
        shapes=["16384x1024", "8192x2048", "8192x2560"],
        dtypes=["bfloat16"],
    )
