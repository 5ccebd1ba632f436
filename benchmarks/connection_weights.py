"""Connection weights, forward and backward: ours beside eager PyTorch and torch.compile, and the floor in bytes.

The floor counts passes over one [tokens, D] tensor ("units"), at the speed of copying as many bytes:
    forward 1 (x);  both 1 + 2 (x; x and dx);  chained 1 + 3 (and the incoming gradient of x).
The hidden rows [tokens, K], the weights and W1, W2 are left out: less than K / D of a unit each. Eager and
torch.compile are each given the better of two formulations (the norm before the product, as the formula has it, and its
factor after it), and are not charged for the addition with which autograd joins the incoming gradient; `chained`
includes it.

    python benchmarks/connection_weights.py --csv benchmarks/results/h100_connection_weights.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Figure, check_outputs, measure_shapes, result_rows, row_names
from torch import Tensor

from muddformer import ops, reference

WAYS = 4
UNITS = {"forward": 1, "both": 3, "chained": 4}


def factor_after_product(x: Tensor, w1: Tensor, w2: Tensor, prior: Tensor) -> Tensor:
    """The norm's factor multiplies h instead of x: the other way that users write it."""
    factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    h = (F.linear(x, w1) * factor).to(x.dtype)
    return F.linear(F.gelu(h), w2).unflatten(-1, prior.shape) + prior.to(x.dtype)


def forward_backward(function: Callable, inputs: list[Tensor], grad: Tensor) -> Callable:
    """One call: the forward, then the gradients of all inputs."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def chained(inputs: list[Tensor], grad: Tensor, incoming: Tensor) -> Callable:
    """The same with the gradient of x that later layers have accumulated joined in."""
    return lambda: torch.autograd.grad(ops.connection_weights_chained(*inputs), inputs, [grad, incoming])


def check(inputs: list[Tensor], grad: Tensor, functions: dict[str, Callable]) -> None:
    """Every formulation computes the same, against float64 on 256 tokens."""

    def evaluate(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in [inputs[0][:256], *inputs[1:]]]
        weights = function(*leaves)
        return [weights, *torch.autograd.grad(weights, leaves, grad[:256].to(dtype))]

    dtype = inputs[0].dtype
    expected = evaluate(reference.connection_weights, torch.float64)
    for name, function in functions.items():
        check_outputs(name, evaluate(function, dtype), expected, dtype)


def measure(
    tokens: int, width: int, sources: int, dtype: torch.dtype, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    hidden = (WAYS * sources // 64 + 1) * 64
    leaf = lambda *shape, std=1.0: (torch.randn(shape, device=device) * std).to(dtype).requires_grad_()  # noqa: E731
    inputs = [
        leaf(tokens, width),
        leaf(hidden, width, std=width**-0.5),
        leaf(WAYS * sources, hidden, std=hidden**-0.5),
        leaf(WAYS, sources),
    ]
    grad = torch.randn(tokens, WAYS, sources, device=device).to(dtype)
    incoming = torch.randn_like(inputs[0])
    torch._dynamo.reset()
    naive = [reference.connection_weights, factor_after_product]
    forms = {
        "eager": naive,
        "compile": [torch.compile(f, fullgraph=True) for f in naive],
        "ours": [ops.connection_weights],
    }
    forms = {method: forms[method] for method in methods}
    check(inputs, grad, {f"{k} {i}": f for k, fs in forms.items() for i, f in enumerate(fs)})
    unit = tokens * width * inputs[0].element_size()

    def figure(method: str, kind: str, calls: list[Callable]) -> Figure:
        names = {**row_names("connection_weights", method, kind, dtype, tokens, width, sources, WAYS), "K": hidden}
        return Figure(names, calls, UNITS[kind] * unit)

    figures = []
    for method, functions in forms.items():
        figures.append(figure(method, "forward", [torch.no_grad()(lambda f=f: f(*inputs)) for f in functions]))
        figures.append(figure(method, "both", [forward_backward(f, inputs, grad) for f in functions]))
    if "ours" in methods:
        figures.append(figure("ours", "chained", [chained(inputs, grad, incoming)]))
    return result_rows(figures, tokens * width, dtype, device, seconds)


if __name__ == "__main__":
    print("floor in passes over [tokens, D]: " + ", ".join(f"{kind} {units}" for kind, units in UNITS.items()))
    measure_shapes(__doc__.split("\n")[0], measure, sources=[9, 17, 25, 33], shapes=["8192x2048"], dtypes=["bfloat16"])
