"""Host time of one layer: what Python, the dispatcher and autograd take before the device has work.

On CUDA calls are enqueued without waiting for them; on a CPU the tensors are so small that computing takes next to
nothing. Beside them the floor on the same host, written in C++: an operator of the same signature that does nothing,
and one with a node of autograd that keeps and hands on the same tensors and computes nothing; and
torch.nn.functional.linear with its backward.

    python benchmarks/host_time.py --csv benchmarks/results/h100_host_time.csv
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import parser, write_rows
from torch.utils.cpp_extension import load_inline

from muddformer import ops
from muddformer.nn import DepthAggregation, RMSNorm

ROUNDS = 20
CALLS = 20  # enqueued in a row; few enough that the device's queue never fills
EMPTY = """
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

using Lists = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
using torch::autograd::variable_list;

Lists empty(at::TensorList hiddens, const at::Tensor&) {
  return {hiddens.vec(), hiddens.vec()};
}

struct EmptyNode : torch::autograd::Function<EmptyNode> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList hiddens,
                               const at::Tensor& weights) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved = hiddens.vec(), outputs;
    saved.push_back(weights);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    for (int64_t way = 0; way < weights.size(-2); ++way) outputs.push_back(at::empty_like(hiddens[0]));
    outputs.insert(outputs.end(), hiddens.begin(), hiddens.end());
    return outputs;
  }
  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list&) {
    variable_list grads;
    for (const at::Tensor& tensor : ctx->get_saved_variables()) grads.push_back(at::empty_like(tensor));
    return grads;
  }
};

Lists node(at::TensorList hiddens, const at::Tensor& weights) {
  variable_list outputs = EmptyNode::apply(hiddens, weights);
  const auto handed_on = outputs.end() - hiddens.size();
  std::vector<at::Tensor> second(handed_on, outputs.end());
  outputs.erase(handed_on, outputs.end());
  return {std::move(outputs), std::move(second)};
}

TORCH_LIBRARY(host_time, m) {
  m.def("empty(Tensor[] hiddens, Tensor weights) -> (Tensor[], Tensor[])");
  m.def("node(Tensor[] hiddens, Tensor weights) -> (Tensor[], Tensor[])");
}
TORCH_LIBRARY_IMPL(host_time, CompositeImplicitAutograd, m) {
  m.impl("empty", empty);
  m.impl("node", node);
}
"""


def host_us(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Microseconds that the host is kept by a call, again and again."""
    times: list[float] = []
    for _ in range(3 * CALLS):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e6 * (time.perf_counter() - begin) / CALLS)
    return times


def calls(
    sources: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """What is timed, by name: forward, and forward with backward."""
    make = {"device": device, "dtype": dtype}
    hiddens = [torch.randn(tokens, width, **make).requires_grad_() for _ in range(sources)]
    weights = torch.randn(tokens, 4, sources, **make).requires_grad_()
    w = torch.randn(width, width, **make).requires_grad_()
    da = DepthAggregation(width, sources, round64=True, **make)
    torch.nn.init.normal_(da.w2.weight, std=0.02)
    norms = [*(RMSNorm(width, **make) for _ in range(3)), None]
    grads = [torch.randn_like(hiddens[0]) for _ in range(4)]
    leaves = [*hiddens, *da.parameters(), *(norm.weight for norm in norms[:3])]

    def layer() -> list[torch.Tensor]:
        return da(hiddens, stream_norms=norms)[0]

    def aggregate() -> list[torch.Tensor]:
        return ops.depth_aggregate_chained(hiddens, weights)[0]

    def linear() -> torch.Tensor:
        return F.linear(hiddens[0], w)

    def node() -> list[torch.Tensor]:
        return torch.ops.host_time.node.default(hiddens, weights)[0]

    return {
        "empty operator": lambda: torch.ops.host_time.empty.default(hiddens, weights),
        "empty node": node,
        "empty node, both": lambda: torch.autograd.grad(node(), [*hiddens, weights], grads),
        "linear": linear,
        "linear, both": lambda: torch.autograd.grad(linear(), [hiddens[0], w], grads[0]),
        "aggregate": aggregate,
        "aggregate, both": lambda: torch.autograd.grad(aggregate(), [*hiddens, weights], grads),
        "layer without gradients": torch.no_grad()(layer),
        "layer": layer,
        "layer, both": lambda: torch.autograd.grad(layer(), leaves, grads),
    }


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--sources", type=int, nargs="+", default=[2, 9, 25], help="numbers of sources S")
    args = p.parse_args()
    device = torch.device(args.device)
    load_inline("host_time", EMPTY, extra_cflags=["-O2"], is_python_module=False, verbose=False)
    tokens, width, dtype = (256, 1024, torch.bfloat16) if device.type == "cuda" else (1, 8, torch.float32)
    rows = []
    for sources in args.sources:
        made = calls(sources, tokens, width, dtype, device)
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(ROUNDS):  # in turns, so that all share what else the machine does
            for name, call in made.items():
                times[name] += host_us(call, device, args.seconds / ROUNDS)
        for name, own in times.items():
            us = statistics.median(own)
            print(f"S {sources:>3}  {name:<24} {us:>8.1f} us", flush=True)
            rows.append({"call": name, "tokens": tokens, "D": width, "S": sources, "us": round(us, 2)})
    write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
