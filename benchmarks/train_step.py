"""One training step (forward, loss, backward, fused AdamW) of a MUDDFormer beside its plain twin, in one run.

bfloat16 autocast over float32 parameters, vocabulary 50304. Methods: a model and how it runs, joined by a dash.
    models: plain (our Transformer++, its residual stream in float32), plain16 (the same with its residual stream in
    bfloat16, as a MUDDFormer has it), mudd (ours), prepost (ours with PrePostDANorm), 2x2 (ours, k x p = 2 x 2), naive
    (the same MUDDFormer with its connections written in plain PyTorch), llama (Hugging Face's LlamaForCausalLM),
    reference (Model of the file that --reference names); mudd+window=8 sets a field of the configuration
    runs: compile (torch.compile of the whole model), graphs (the same in CUDA graphs, mode="reduce-overhead"), ckpt
    (compiled, every block computed again in the backward), selective (likewise, but for matrix products and
    attention), block (torch.compile of every block), eager

"ms" is what the device needs for a step, the host being ahead; "loop_ms" is a step of a loop by the clock, which is
longer where the host cannot keep ahead.

Every method runs in a process of its own with an empty compile cache, so that peak memory and the first step are its
own. Its row is written when it is done: name first what matters most. A method that does not fit or runs out of time is
a row that says so. Ratios "of_plain" are to the compiled twin, those "of_twin" to the twin run the same way, the twin
being the faster one of plain and plain16, if both were measured before; bound_rmw and bound_deferred are what the bytes
of the connections, at the speed of a copy measured in the same process, allow at best beside the compiled twin
(benchmarks/training.py has the formulas, of these and of the FLOPs).

    python benchmarks/train_step.py --models 24x1024:8 24x2048:4 --csv benchmarks/results/h100_train_step.csv
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from common import copy_gb_per_s, median_ms, parser, write_rows
from training import TWINS, Method, Shape, connection_bytes, step_flops, training_step

PEAK_FLOPS = 989e12  # of H100 and H200, dense bfloat16
FIGURES = (
    "parameters", "ms", "loop_ms", "tokens_per_s", "mfu", "peak_gib", "first_step_s", "loss", "copy_gb_per_s",
    "bytes_rmw_ms", "bytes_deferred_ms",
)  # fmt: skip
LOOP = 10  # steps
LEAST_SECONDS = 20  # a method is not begun with less time left


def measure(method: Method, shape: Shape, device: torch.device, seconds: float, reference: Path | None) -> dict:
    """The figures of one method."""
    cuda = device.type == "cuda"
    speed = copy_gb_per_s(2**28 if cuda else 2**22, torch.bfloat16, device, 0.2)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with training_step(method, shape, device, reference) as (model, step):
        begin = time.perf_counter()
        loss = step().item()
        first = time.perf_counter() - begin
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(step, device, seconds)
        loop = loop_ms(step, device)
    chained, deferred = (size / speed / 1e6 for size in connection_bytes(model, shape))
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] if method.run == "graphs" else 0
    return {
        "status": f"{skipped} graphs run without a CUDA graph" if skipped else "ok",
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": round(ms, 3),
        "loop_ms": round(loop, 3),
        "tokens_per_s": round(shape.tokens / ms * 1e3),
        "mfu": round(step_flops(model, shape) / ms / 1e-3 / PEAK_FLOPS, 3) if cuda else "",
        # The allocator does not count what a CUDA graph keeps in the pool of its own.
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda and method.run != "graphs" else "",
        "first_step_s": round(first, 1),
        "loss": round(loss, 4),
        "copy_gb_per_s": round(speed),
        "bytes_rmw_ms": round(chained, 3),
        "bytes_deferred_ms": round(deferred, 3),
    }


def loop_ms(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a step in a loop that waits for nothing, by the clock."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    begin = time.perf_counter()
    for _ in range(LOOP):
        step()
    wait()
    return 1e3 * (time.perf_counter() - begin) / LOOP


def measure_here(task: dict) -> None:
    """The process of one method: prints its figures as JSON, or a status that says why there are none."""
    method, shape, device = Method.parse(task["method"]), Shape(*task["shape"]), torch.device(task["device"])
    try:
        figures = measure(method, shape, device, task["seconds"], task["reference"] and Path(task["reference"]))
    except Exception as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
            figures = {"status": "out of memory"}
        else:
            traceback.print_exc()
            figures = {"status": f"failed: {type(error).__name__}: {(text.splitlines() or [''])[0][:200]}"}
    print(json.dumps(figures))


def measure_apart(task: dict, seconds: float, kept_cache: Path | None) -> dict:
    """Figures of a method from a process of its own, which is stopped when the seconds are over."""
    with contextlib.ExitStack() as stack:
        cache = kept_cache or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="muddformer-inductor-", ignore_cleanup_errors=True)
        )
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps(task)],
                stdout=subprocess.PIPE,
                text=True,
                timeout=seconds,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
            )
        except subprocess.TimeoutExpired:
            return {"status": f"stopped after {seconds:.0f} s"}
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        figures = json.loads(done.stdout.splitlines()[-1])
        return {**figures, "first_step_s": ""} if kept_cache else figures
    return {"status": f"failed: the process ended with exit code {done.returncode}"}


def fair_twin(measured: dict[str, dict], run: str) -> dict:
    """The figures of the faster plain model of those that were measured."""
    figures = [measured[f"{form}-{run}"] for form in TWINS if "ms" in measured.get(f"{form}-{run}", {})]
    return min(figures, key=lambda row: row["ms"], default={})


def ratio(part: float | None, whole: float | None) -> float | str:
    return round(part / whole, 3) if part and whole else ""


def comparisons(figures: dict, plain: dict, twin: dict) -> dict[str, object]:
    """Throughput and memory beside the plain model's, and what bytes allow; empty where a figure is missing."""
    row: dict[str, object] = {}
    for name, other in (("plain", plain), ("twin", twin)):
        row[f"throughput_of_{name}"] = ratio(other.get("ms"), figures.get("ms"))
        row[f"memory_of_{name}"] = ratio(figures.get("peak_gib"), other.get("peak_gib"))
    for kind in ("rmw", "deferred"):
        ms, moved = plain.get("ms"), figures.get(f"bytes_{kind}_ms")
        row[f"bound_{kind}"] = ratio(ms, ms + moved) if ms and moved else ""
    return row


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--models", nargs="+", default=["12x1024:8"], help="layers x width : sequences")
    p.add_argument("--batch", type=int, default=8, help="sequences, of models that name none")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument(
        "--methods",
        nargs="+",
        default=["plain-compile", "plain16-compile", "mudd-compile"],
        help="MODEL-RUN, see the file",
    )
    p.add_argument("--reference", type=Path, help="file with the class Model of the method reference")
    p.add_argument("--timeout", type=float, default=300, help="seconds that one method may take")
    p.add_argument("--minutes", type=float, default=60, help="minutes that all of it may take")
    p.add_argument("--cache", type=Path, help="compile cache to start from and to keep: no first step is reported then")
    args = p.parse_args()
    end = time.monotonic() + 60 * args.minutes
    shapes = [Shape.parse(text, args.batch, args.length) for text in args.models]
    methods = [Method.parse(text) for text in args.methods]
    if args.reference is None and any(method.form == "reference" for method in methods):
        p.error("the model reference needs --reference PATH")
    failed = False
    for shape in shapes:
        measured: dict[str, dict] = {}
        for method in methods:
            task = {"method": method.text, "shape": dataclasses.astuple(shape), "device": args.device}
            task |= {"seconds": args.seconds, "reference": args.reference and str(args.reference)}
            left = end - time.monotonic()
            figures = {"status": f"not run: {max(left, 0):.0f} s left"}
            if left >= LEAST_SECONDS:
                figures = measure_apart(task, min(left, args.timeout), args.cache)
            measured[method.text] = figures
            failed |= figures["status"].startswith("failed")
            plain, twin = (fair_twin(measured, run) for run in ("compile", method.run))
            row = {"model": str(shape), "method": method.text, "batch": shape.batch, "length": shape.length}
            row |= {"status": figures["status"], **{name: figures.get(name, "") for name in FIGURES}}
            row |= comparisons(figures, plain, twin)
            print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
            write_rows([row], args.csv, torch.device(args.device))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure_here(json.loads(sys.argv[2]))
    else:
        main()
