"""Decoding: one layer of connections for a few tokens, ours in one kernel beside eager PyTorch and torch.compile.

A call runs a chain of layers, each with weights of its own, the residual stream of one being the newest hidden state of
the next; figures are per layer. On CUDA some passes over the chain are one CUDA graph, so that neither host time nor
the start of a graph is in them: for torch.compile this is what mode="reduce-overhead" does at its best. The floor
counts W1, W2, the sources and the streams once, at the speed of a large copy.

    python benchmarks/decode.py --csv benchmarks/results/h100_decode.csv
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import check_outputs, copy_gb_per_s, median_ms, parser, write_rows
from torch import Tensor

from muddformer import ops, reference

WAYS = 4
Layer = dict[str, Any]


def eager(hiddens: list[Tensor], layer: Layer) -> list[Tensor]:
    """The layer as users write it."""
    weights = reference.connection_weights(hiddens[-1], layer["w1"], layer["w2"], layer["prior"])
    return normed(reference.depth_aggregate_einsum(hiddens, weights), layer)


def composed(hiddens: list[Tensor], layer: Layer) -> list[Tensor]:
    """The layer out of our operators for training."""
    weights = ops.connection_weights(hiddens[-1], layer["w1"], layer["w2"], layer["prior"])
    return normed(ops.depth_aggregate(hiddens, weights), layer)


def step(hiddens: list[Tensor], layer: Layer) -> list[Tensor]:
    """The layer in one operator."""
    return ops.depth_aggregation_step(hiddens, **layer)


def normed(streams: list[Tensor], layer: Layer) -> list[Tensor]:
    """The norms of the q, k and v streams."""
    if layer["norm"] == "none":
        return streams
    pairs = zip(streams, layer["norm_weights"], strict=True)
    return [y if weight is None else F.rms_norm(y, weight.shape, weight, 1e-6) for y, weight in pairs]


def chain(function: Callable, hiddens: list[Tensor], layers: list[Layer], passes: int) -> None:
    """All layers, one after the other, some times."""
    for _ in range(passes):
        newest = hiddens[-1]
        for layer in layers:
            newest = function([*hiddens[:-1], newest], layer)[-1]


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph; itself on a CPU."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(args: Any, batch: int, norm: str, device: torch.device, copy_speed: float) -> list[dict]:
    """Rows of one batch size."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    width, sources = args.dim, args.sources
    hidden = (WAYS * sources // 64 + 1) * 64
    make = lambda *shape, scale=1.0: (torch.randn(shape, device=device) * scale).to(dtype)  # noqa: E731
    layers = [
        {
            "w1": make(hidden, width, scale=width**-0.5),
            "w2": make(WAYS * sources, hidden, scale=0.1 * hidden**-0.5),
            "prior": make(WAYS, sources, scale=sources**-0.5),
            "norm": norm,
            "norm_weights": [] if norm == "none" else [*(make(width) for _ in range(WAYS - 1)), None],
        }
        for _ in range(args.layers)
    ]
    hiddens = [make(batch, 1, width) for _ in range(sources)]
    exact = step([x.double() for x in hiddens], {k: cast(v) for k, v in layers[0].items()})
    torch._dynamo.reset()
    forms = {
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True, dynamic=False),
        "composed": composed,
        "ours": step,
    }
    floor_bytes = hiddens[0].element_size() * (hidden * (width + WAYS * sources) + batch * width * (sources + WAYS))
    rows = []
    for method in args.methods:
        function = forms[method]
        check_outputs(method, function(hiddens, layers[0]), exact, dtype)
        call = graphed(lambda f=function: chain(f, hiddens, layers, args.passes), device)
        us = 1e3 * median_ms(call, device, args.seconds) / (args.layers * args.passes)
        floor_us = floor_bytes / copy_speed / 1e3
        rows.append(
            {
                "op": "depth_aggregation_step",
                "method": method,
                "norm": norm,
                "dtype": args.dtype,
                "batch": batch,
                "D": width,
                "S": sources,
                "C": WAYS,
                "K": hidden,
                "layers": args.layers,
                "us": round(us, 2),
                "floor_us": round(floor_us, 2),
                "fraction_of_floor": round(floor_us / us, 3),
            }
        )
    return rows


def cast(value: Any) -> Any:
    """float64 of a tensor, or of a list of them."""
    if isinstance(value, Tensor):
        return value.double()
    return [cast(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="tokens of a step")
    p.add_argument("--dim", type=int, default=2560, help="model width D")
    p.add_argument("--sources", type=int, default=33, help="number of sources S")
    p.add_argument("--layers", type=int, default=32, help="layers of a chain")
    p.add_argument("--passes", type=int, default=8, help="passes over the chain in one CUDA graph")
    p.add_argument("--dtype", default="bfloat16", help="name of a torch dtype")
    p.add_argument("--methods", nargs="+", default=["eager", "compile", "composed", "ours"], help="what to measure")
    p.add_argument("--norms", nargs="+", default=["none", "rms"], help="norms of the q, k and v streams")
    args = p.parse_args()
    device = torch.device(args.device)
    elements = 2**26 if device.type == "cuda" else 2**22
    with torch.no_grad():
        copy_speed = copy_gb_per_s(elements, getattr(torch, args.dtype), device, args.seconds)
        print(f"copy {copy_speed:.0f} GB/s\n batch  norm    method        us    floor  of floor")
        for batch in args.batches:
            for norm in args.norms:
                rows = measure(args, batch, norm, device, copy_speed)
                for r in rows:
                    print(
                        f"{batch:>6} {norm:>5} {r['method']:>9} {r['us']:>9.2f} {r['floor_us']:>8.2f} "
                        f"{r['fraction_of_floor']:>9.3f}",
                        flush=True,
                    )
                write_rows(rows, args.csv, device)


if __name__ == "__main__":
    main()
