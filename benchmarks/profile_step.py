"""Where the time of a training step goes: the kernels of a plain step and of a MUDD step, by kind, so that every
millisecond of the difference has a name.

The rows are the kinds, in milliseconds of a step; a kernel that is launched before its predecessor has ended, to wait
for it, counts from that end on. "Between kernels" is what the step takes beyond them. It also prints the longest
kernels of both.

    python benchmarks/profile_step.py --model 24x1024:8 --csv benchmarks/results/h100_profile_step.csv
"""

from __future__ import annotations

import collections
import gc
import re

import torch
from common import median_ms, parser, write_rows
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training import Method, Shape, training_step

STEPS = 5
KINDS = {  # the first that matches the name of a kernel (on a CPU: of an operator)
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
    "norms and elementwise": r"triton_|cpp_fused|elementwise|_norm|swiglu|at::native::reduce_kernel|embedding|cat"
    r"|sum_partials",
    "copies and fills": r"memcpy|memset|aten::(copy_|fill_|zero_)$",
}
REST = ("other kernels", "between kernels")


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST[0])


def profiled(method: Method, shape: Shape, device: torch.device, seconds: float) -> tuple[float, dict[str, list]]:
    """Milliseconds of a step, and of every kernel by name: [milliseconds, launches] a step."""
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with training_step(method, shape, device) as (_, step):
        ms = median_ms(step, device, seconds)  # which warms up too
        with profile(activities=activities) as found:
            for _ in range(STEPS):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    kernels: dict[str, list] = collections.defaultdict(lambda: [0.0, 0.0])
    end = 0.0
    for event in sorted(found.events(), key=lambda event: event.time_range.start):
        if event.is_user_annotation or (device.type == "cuda" and event.device_type != DeviceType.CUDA):
            continue  # an annotation encloses kernels that count themselves
        us = event.self_cpu_time_total
        if device.type == "cuda":  # a kernel may begin before the one before it has ended, and wait for it
            us = max(event.time_range.end - max(event.time_range.start, end), 0.0)
            end = max(end, event.time_range.end)
        kernels[event.name][0] += us / STEPS / 1e3
        kernels[event.name][1] += 1 / STEPS
    gc.collect()
    return ms, kernels


def by_kind(ms: float, kernels: dict[str, list]) -> dict[str, float]:
    times = dict.fromkeys((*KINDS, *REST), 0.0)
    for name, (time, _) in kernels.items():
        times[kind_of(name)] += time
    times[REST[1]] = ms - sum(times.values())
    return times


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--model", default="12x1024:8", help="layers x width : sequences")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument("--methods", nargs=2, default=["plain-compile", "mudd-compile"], help="as in train_step.py")
    args = p.parse_args()
    device, shape = torch.device(args.device), Shape.parse(args.model, 8, args.length)
    methods = [Method.parse(text) for text in args.methods]
    times = []
    for method in methods:
        ms, kernels = profiled(method, shape, device, args.seconds)
        times.append(by_kind(ms, kernels))
        print(f"\n{method.text}, {shape}, {shape.batch} x {shape.length} tokens: {ms:.3f} ms; the longest kernels")
        for name, (time, launches) in sorted(kernels.items(), key=lambda item: -item[1][0])[:15]:
            print(f"{time:9.3f} ms {launches:7.1f} x  {kind_of(name):28} {name[:120]}")
    rows = []
    print(f"\n{'milliseconds of a step':30} {args.methods[0]:>16} {args.methods[1]:>16} {'difference':>12}")
    for kind in (*times[0], "step"):
        plain, mudd = (sum(t.values()) if kind == "step" else t[kind] for t in times)
        print(f"{kind:30} {plain:16.3f} {mudd:16.3f} {mudd - plain:12.3f}")
        row = {"model": str(shape), "batch": shape.batch, "length": shape.length, "methods": " ".join(args.methods)}
        row |= {"category": kind, "plain_ms": round(plain, 3), "mudd_ms": round(mudd, 3)}
        rows.append({**row, "difference_ms": round(mudd - plain, 3)})
    write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
