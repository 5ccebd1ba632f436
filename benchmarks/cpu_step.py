"""A training step on a CPU, eager beside torch.compile of the whole model, in turns in one process.

Forward, loss, backward and fused AdamW, vocabulary 50304, float32 or bfloat16 autocast (--precision bfloat16), which is
slow on CPUs without instructions for it. "eager_of_compile" is the eager step's time over the compiled one's.

    python benchmarks/cpu_step.py --csv benchmarks/results/cpu_step.csv
"""

from __future__ import annotations

import contextlib

import torch
from common import medians_ms, parser, write_rows
from training import Method, Shape, training_step

TARGET = 1.1


def measure(form: str, shape: Shape, precision: str, seconds: float) -> dict[str, object]:
    """The row of a model."""
    cpu, steps = torch.device("cpu"), []
    with contextlib.ExitStack() as stack:
        for run in ("eager", "compile"):
            step = training_step(Method.parse(f"{form}-{run}"), shape, cpu, autocast=precision == "bfloat16")
            steps.append(stack.enter_context(step)[1])
        losses = [step().item() for step in steps]
        eager, compiled = medians_ms(steps, cpu, seconds)
    assert abs(losses[0] - losses[1]) < 1e-2, losses
    row = {"model": str(shape), "form": form, "batch": shape.batch, "length": shape.length, "precision": precision}
    row |= {"eager_ms": round(eager, 1), "compile_ms": round(compiled, 1)}
    return row | {"eager_of_compile": round(eager / compiled, 3), "target": TARGET}


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--model", default="12x256:1", help="layers x width : sequences")
    p.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    p.add_argument("--forms", nargs="+", default=["plain", "mudd"])
    p.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = p.parse_args()
    for form in args.forms:
        row = measure(form, Shape.parse(args.model, 1, args.length), args.precision, args.seconds)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write_rows([row], args.csv, torch.device("cpu"))


if __name__ == "__main__":
    main()
