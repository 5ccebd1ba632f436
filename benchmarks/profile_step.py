"""Where the time of a training step goes: the kernels of a plain step and of a MUDD step, by kind, so that every
millisecond of the difference has a name.

The rows are the kinds, in milliseconds of a step; a kernel that is launched before its predecessor has ended, to wait
for it, counts from that end on, and communication where nothing else runs. "Between kernels" is the time that nothing
runs. The profiler slows the host, and a step that waits for its host takes longer under it: "less the profiler" is the
step's time without it, minus that with it, so that all rows add up to the step without it. It also prints the longest
kernels of both. Three ways to run a step:

    python benchmarks/profile_step.py --model 24x1024:8 --csv benchmarks/results/h100_profile_step.csv
    python benchmarks/profile_step.py --model 24x1024:8 --methods plain16-eager mudd-eager --cpp build/cpp_step ...
    torchrun --nproc-per-node 2 benchmarks/profile_step.py --model 24x2048:4 --methods plain-block mudd-block ...

--cpp: the C++ models, by the program that `cpp_step.py --build` made. torchrun: sharded by FSDP2 as in fsdp2_step.py.
"""

from __future__ import annotations

import bisect
import collections
import gc
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cpp_step
import fsdp2_step
import torch
import torch.distributed as dist
from common import median_ms, parser, write_rows
from torch.profiler import ProfilerActivity, profile
from training import Method, Shape, model_config, training_step

STEPS = 5
COMMUNICATION = "communication"
KINDS = {  # the first that matches the name of a kernel (on a CPU: of an operator)
    COMMUNICATION: r"nccl",
    "flush of deferred gradients": r"muddformer.*flush",
    "aggregation forward": r"muddformer::kernels::forward_|muddformer::depth_aggregate(_norm)?(_chained)?$",
    "aggregation backward": r"muddformer::kernels::(backward_|.*sum_partials\(.*SumArgs)"
    r"|muddformer::depth_aggregate.*backward",
    "connection weights forward": r"connection_weights_forward|muddformer::connection_weights(_chained)?$",
    "connection weights backward": r"weights_(hidden|input)_backward|muddformer.*(reduce_kernel|sum_rows_kernel)"
    r"|muddformer::connection_weights.*backward",
    "attention": r"flash|fmha|sdpa|efficient_attention|cudnn.*attention|cudnn::fusion",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|splitk|triton_tem|aten::(mm|addmm|bmm)$|mkldnn.*linear",
    "optimizer": r"adam|multi_tensor_apply",
    "loss": r"softmax|nll_loss|cross_entropy|token_losses",
    "gathering and cutting of shards": r"split_with_sizes|chunk_cat",
    "norms and elementwise": r"triton_|cpp_fused|elementwise|_norm|swiglu|at::native::reduce_kernel|embedding|cat"
    r"|sum_partials",
    "copies and fills": r"memcpy|memset|aten::(copy_|fill_|zero_)$",
}
REST = ("other kernels", "between kernels", "less the profiler")


class Kernel(NamedTuple):
    """One that has run: its name, and microseconds from a common zero."""

    name: str
    start: float
    end: float


class Profile(NamedTuple):
    """Of a step under the profiler: milliseconds and launches of every kernel by name, and the milliseconds from the
    start of the first to the end of the last."""

    kernels: dict[str, list[float]]
    ms: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST[0])


# ---- what ran ---------------------------------------------------------------------------------------------------
def read_trace(path: Path) -> list[Kernel]:
    """The kernels, copies and fills of a trace that PyTorch's profiler has written."""
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return [Kernel(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in device]


def profiled(step: Callable[[], object], device: torch.device) -> Profile:
    """The profile of a step; on a CPU, of its operators, which leave no gaps."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            found.export_chrome_trace(str(Path(folder, "trace.json")))
            return own_times(read_trace(Path(folder, "trace.json")))
    events = (event for event in found.events() if not event.is_user_annotation)
    kernels = by_name((event.name, event.self_cpu_time_total) for event in events)
    return Profile(kernels, sum(ms for ms, _ in kernels.values()))


def own_times(kernels: Sequence[Kernel]) -> Profile:
    """Each moment counts for one kernel, the first that runs then, communication last."""
    if not kernels:
        raise SystemExit("the profile has no kernel: did the step run on CUDA?")
    times: list[tuple[str, float]] = []
    starts, ends = [float("-inf")], [float("-inf")]  # where something runs, in order and apart
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    for kernel in (k for k in ordered if kind_of(k.name) != COMMUNICATION):
        start = max(kernel.start, ends[-1])
        times.append((kernel.name, max(kernel.end - start, 0.0)))
        if kernel.start > ends[-1]:
            starts.append(kernel.start)
            ends.append(kernel.end)
        else:
            ends[-1] = max(ends[-1], kernel.end)
    last = float("-inf")
    for kernel in (k for k in ordered if kind_of(k.name) == COMMUNICATION):
        start, alone = max(kernel.start, last), max(kernel.end - max(kernel.start, last), 0.0)
        last = max(last, kernel.end)
        for i in range(bisect.bisect_right(ends, start), len(ends)):
            if starts[i] >= kernel.end:
                break
            alone -= max(min(ends[i], kernel.end) - max(starts[i], start), 0.0)
        times.append((kernel.name, alone))
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    return Profile(by_name(times), span / STEPS / 1e3)


def by_name(times: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Milliseconds and launches a step, from the microseconds of STEPS of them."""
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, us in times:
        kernels[name][0] += us / STEPS / 1e3
        kernels[name][1] += 1 / STEPS
    return kernels


# ---- ways to run a step: milliseconds of it without the profiler, and its profile --------------------------------
def python_step(method: Method, shape: Shape, device: torch.device, seconds: float) -> tuple[float, Profile]:
    """In this process."""
    with training_step(method, shape, device) as (_, step):
        ms = median_ms(step, device, seconds)  # which warms up too
        return ms, profiled(step, device)


def cpp_program_step(method: Method, shape: Shape, build: Path, seconds: float) -> tuple[float, Profile]:
    """By the program of cpp_step.py, in its folder."""
    with tempfile.TemporaryDirectory() as folder:
        config, trace = Path(folder, "config.json"), Path(folder, "trace.json")
        config.write_text(json.dumps(model_config(method, shape).to_dict()))
        arguments = [config, "cuda:0", "bfloat16", shape.batch, shape.length, seconds, torch.get_num_threads()]
        command = [str(build.resolve() / "cpp_step")]
        ms, *_ = cpp_step.measure({"C++": command}, [*arguments, trace, STEPS], turns=1)["C++"]
        return ms, own_times(read_trace(trace))


def sharded_step(method: Method, shape: Shape, device: torch.device) -> tuple[float, Profile]:
    """On this device of those that fsdp2_step.py shards over."""
    step, _ = fsdp2_step.sharded_step(method, shape, fsdp2_step.mesh_of(device), device)
    return statistics.median(fsdp2_step.timed(step).ms), profiled(step, device)


# ---- the table --------------------------------------------------------------------------------------------------
def by_kind(ms: float, found: Profile) -> dict[str, float]:
    times = dict.fromkeys((*KINDS, *REST), 0.0)
    for name, (time, _) in found.kernels.items():
        times[kind_of(name)] += time
    times[REST[1]] = found.ms - sum(times.values())
    times[REST[2]] = ms - found.ms
    return times


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--model", default="12x1024:8", help="layers x width : sequences (of a device)")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument("--methods", nargs=2, default=["plain-compile", "mudd-compile"], help="as in train_step.py")
    p.add_argument("--cpp", type=Path, help="folder of cpp_step.py's program: measure the C++ models, on CUDA")
    args = p.parse_args()
    sharded = "LOCAL_RANK" in os.environ
    device = fsdp2_step.start(args.device) if sharded else torch.device(args.device)
    shape = Shape.parse(args.model, 8, args.length)
    methods, times = [Method.parse(text) for text in args.methods], []
    how = f"FSDP2, {os.environ['WORLD_SIZE']} devices" if sharded else "C++" if args.cpp else "Python"
    quiet = sharded and int(os.environ["LOCAL_RANK"]) > 0
    for method in methods:
        if sharded:
            ms, found = sharded_step(method, shape, device)
        elif args.cpp:
            ms, found = cpp_program_step(method, shape, args.cpp, args.seconds)
        else:
            ms, found = python_step(method, shape, device, args.seconds)
        gc.collect()
        times.append(by_kind(ms, found))
        if quiet:
            continue
        print(f"\n{method.text}, {how}, {shape}, {shape.batch} x {shape.length} tokens: {ms:.3f} ms; longest kernels")
        for name, (time, launches) in sorted(found.kernels.items(), key=lambda item: -item[1][0])[:15]:
            print(f"{time:9.3f} ms {launches:7.1f} x  {kind_of(name):28} {name[:120]}")
    if sharded:
        dist.destroy_process_group()
    if quiet:
        return
    rows = []
    print(f"\n{'milliseconds of a step':30} {args.methods[0]:>16} {args.methods[1]:>16} {'difference':>12}")
    for kind in (*times[0], "step"):
        plain, mudd = (sum(t.values()) if kind == "step" else t[kind] for t in times)
        print(f"{kind:30} {plain:16.3f} {mudd:16.3f} {mudd - plain:12.3f}")
        row = {"model": str(shape), "batch": shape.batch, "length": shape.length, "run": how}
        row |= {"methods": " ".join(args.methods), "category": kind, "plain_ms": round(plain, 3)}
        rows.append({**row, "mudd_ms": round(mudd, 3), "difference_ms": round(mudd - plain, 3)})
    write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
