"""A linear layer under bfloat16 autocast over float32 weights, with a residual: ours beside eager and torch.compile.

    forward   the product, and the residual added to it
    both      and the gradients of x (bfloat16), weight (float32) and residual
The floor is the products by themselves (one, three), measured in the same run. The second floor has besides what
must be read and written for all else, at the speed of a copy: the residual, the weight's copy in bfloat16, and the two
bytes more of an entry of its gradient.

    python benchmarks/linear.py --csv benchmarks/results/h100_linear.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import check_outputs, copy_gb_per_s, medians_ms, parser, peak_memory_mib, write_rows
from torch import Tensor

from muddformer import ops

KINDS = {"forward": 1, "both": 3}


def naive(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As one writes it."""
    return residual + F.linear(x, weight)


def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The operator."""
    return ops.linear(x, weight, residual=residual)


def measure(tokens: int, width: int, out: int, device: torch.device, seconds: float, methods: list[str]) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(out, width, device=device) * width**-0.5).requires_grad_()
    residual, grad = (torch.randn(tokens, out, device=device).bfloat16() for _ in range(2))
    residual.requires_grad_()
    leaves = [x, weight, residual]

    def cast(function: Callable) -> Callable:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return function(*tensors)

        return call

    forms = {"eager": cast(naive), "compile": torch.compile(cast(naive), fullgraph=True), "ours": cast(ours)}
    forms = {method: forms[method] for method in methods}

    def both(function: Callable, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, dy)]

    few = [x[:256].detach(), weight.detach(), residual[:256].detach()]
    expected = both(naive, [t.double().requires_grad_() for t in few], grad[:256].double())
    for name, function in forms.items():
        check_outputs(name, both(function, [t.requires_grad_() for t in few], grad[:256]), expected, torch.bfloat16)

    narrow, rows = weight.detach().bfloat16(), x.detach()
    products = [lambda: torch.mm(rows, narrow.t()), lambda: torch.mm(grad, narrow), lambda: torch.mm(grad.t(), rows)]
    calls = {}
    for name, function in forms.items():
        calls[name, "forward"] = torch.no_grad()(lambda f=function: f(*leaves))
        calls[name, "both"] = lambda f=function: both(f, leaves, grad)
    times = medians_ms([*products, *calls.values()], device, seconds)
    speed = copy_gb_per_s(tokens * out, torch.bfloat16, device, seconds)
    more = {"forward": 2 * tokens * out + 6 * width * out, "both": 2 * tokens * out + 8 * width * out}  # bytes
    result = []
    for ((name, kind), call), ms in zip(calls.items(), times[3:], strict=True):
        floor, memory = sum(times[: KINDS[kind]]), peak_memory_mib(call, device)
        with_bytes = floor + more[kind] / speed / 1e6
        result.append(
            {
                "op": "linear",
                "method": name,
                "kind": kind,
                "dtype": "bfloat16",
                "tokens": tokens,
                "in": width,
                "out": out,
                "ms": round(ms, 4),
                "floor_ms": round(floor, 4),
                "fraction_of_floor": round(floor / ms, 3),
                "bytes_floor_ms": round(with_bytes, 4),
                "fraction_of_bytes_floor": round(with_bytes / ms, 3),
                "peak_mib": "" if memory is None else round(memory, 1),
            }
        )
    return result


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    shapes = [
        "16384x1024x1024",
        "16384x2816x1024",
        "16384x1024x2816",
        "8192x2048x2048",
        "8192x5632x2048",
        "8192x2560x2560",
    ]
    p.add_argument("--shapes", nargs="+", default=shapes, help="tokens x in x out")
    p.add_argument("--methods", nargs="+", default=["eager", "compile", "ours"], help="what to measure")
    args = p.parse_args()
    device = torch.device(args.device)
    print("           shape   method     kind        ms    floor of floor  with bytes of that     MiB")
    for shape in args.shapes:
        rows = measure(*map(int, shape.split("x")), device, args.seconds, args.methods)
        for r in rows:
            print(
                f"{shape:>16} {r['method']:>8} {r['kind']:>8} {r['ms']:>9.4f} {r['floor_ms']:>8.4f} "
                f"{r['fraction_of_floor']:>8.3f} {r['bytes_floor_ms']:>11.4f} {r['fraction_of_bytes_floor']:>7.3f} "
                f"{r['peak_mib'] or 0:>7.0f}",
                flush=True,
            )
        write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
