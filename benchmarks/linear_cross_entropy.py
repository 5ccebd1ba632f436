"""Head and loss under bfloat16 autocast over a float32 head: ours beside eager and torch.compile, and the floor.

    forward   the loss alone, without gradients
    both      the loss and the gradients of hidden states and head
The floor is the products by themselves (one for the forward, three for both: measured in the same run), and one pass
over the logits in 16 bits, read and written, at the speed of a copy of as many bytes. The head's casts are not in it.

    python benchmarks/linear_cross_entropy.py --csv benchmarks/results/h100_linear_cross_entropy.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import check_outputs, copy_call, medians_ms, parser, peak_memory_mib, write_rows
from torch import Tensor

from muddformer import ops, reference

KINDS = {"forward": 1, "both": 3}  # and their products


def under_autocast(function: Callable, device: torch.device) -> Callable:
    """The function as a training step calls it."""

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return function(hidden, weight, targets)

    return call


def both(function: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    loss = function(hidden, weight, targets)
    return [loss, *torch.autograd.grad(loss, [hidden, weight])]


def measure(
    tokens: int, width: int, classes: int, device: torch.device, seconds: float, methods: list[str]
) -> list[dict]:
    """Rows of one shape."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(classes, width, device=device) * width**-0.5).requires_grad_()
    targets = torch.randint(classes, (tokens,), device=device)
    eager = under_autocast(reference.linear_cross_entropy, device)
    forms = {
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True),
        "ours": under_autocast(ops.linear_cross_entropy, device),
    }
    forms = {method: forms[method] for method in methods}
    few = hidden[:256].detach(), weight.detach(), targets[:256]
    wide = [t.double().requires_grad_() for t in few[:2]]
    expected = both(reference.linear_cross_entropy, *wide, few[2])
    for name, function in forms.items():
        leaves = [t.requires_grad_() for t in few[:2]]
        check_outputs(name, both(function, *leaves, few[2]), expected, torch.bfloat16)

    narrow, rows = weight.detach().bfloat16(), hidden.detach()
    logits = torch.empty(tokens, classes, device=device, dtype=torch.bfloat16)
    products = [
        lambda: torch.mm(rows, narrow.t()),
        lambda: torch.mm(logits, narrow),
        lambda: torch.mm(logits.t(), rows),
    ]
    copy, _ = copy_call(logits.numel(), torch.bfloat16, device)  # reads and writes the logits once
    calls = {}
    for name, function in forms.items():
        calls[name, "forward"] = torch.no_grad()(lambda f=function: f(hidden, weight, targets))
        calls[name, "both"] = lambda f=function: both(f, hidden, weight, targets)
    copy_ms, *times = medians_ms([copy, *products, *calls.values()], device, seconds)
    result = []
    for ((name, kind), call), ms in zip(calls.items(), times[3:], strict=True):
        floor = sum(times[: KINDS[kind]]) + (copy_ms if kind == "both" else copy_ms / 2)
        memory = peak_memory_mib(call, device)
        result.append(
            {
                "op": "linear_cross_entropy",
                "method": name,
                "kind": kind,
                "dtype": "bfloat16",
                "tokens": tokens,
                "D": width,
                "V": classes,
                "ms": round(ms, 4),
                "products_ms": round(sum(times[: KINDS[kind]]), 4),
                "floor_ms": round(floor, 4),
                "fraction_of_floor": round(floor / ms, 3),
                "peak_mib": "" if memory is None else round(memory, 1),
            }
        )
    return result


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--shapes", nargs="+", default=["16384x1024", "8192x2048", "8192x2560"], help="tokens x D")
    p.add_argument("--classes", type=int, nargs="+", default=[50304], help="numbers of classes V")
    p.add_argument("--methods", nargs="+", default=["eager", "compile", "ours"], help="what to measure")
    args = p.parse_args()
    device = torch.device(args.device)
    print("      shape      V   method     kind        ms  products    floor of floor     MiB")
    for shape in args.shapes:
        tokens, width = map(int, shape.split("x"))
        for classes in args.classes:
            rows = measure(tokens, width, classes, device, args.seconds, args.methods)
            for r in rows:
                print(
                    f"{shape:>11} {classes:>6} {r['method']:>8} {r['kind']:>8} {r['ms']:>9.4f} "
                    f"{r['products_ms']:>9.4f} {r['floor_ms']:>8.4f} {r['fraction_of_floor']:>8.3f} "
                    f"{r['peak_mib'] or 0:>7.0f}",
                    flush=True,
                )
            write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
