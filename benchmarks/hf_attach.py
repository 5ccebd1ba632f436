"""One training step of a Qwen3-shaped model of transformers, with attached MUDD connections and without, in one run.

Forward, loss, backward and fused AdamW. Models: plain (as transformers makes it), plain16 (its residual stream in
bfloat16, as an attached model has it; under autocast alone) and attached. Runs: eager, block (torch.compile of every
decoder layer), compile (of the whole model). Precisions: autocast (bfloat16 over float32 parameters) and bfloat16
(parameters too). The ratio is to the faster one of the plain models that ran the same way before it; bound_rmw and
bound_deferred are what the bytes of the connections, at the speed of a copy, allow at best (benchmarks/training.py has
the formulas).

    python benchmarks/hf_attach.py --model 16x2048:4 --csv benchmarks/results/h100_hf_attach.csv
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch
from common import copy_gb_per_s, median_ms, parser, write_rows
from torch import Tensor, nn
from training import VOCABULARY, Shape, connection_bytes
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from muddformer.hf import attach
from muddformer.training.optim import parameter_groups

MODELS = ("plain", "plain16", "attached")
RUNS = ("eager", "block", "compile")
PRECISIONS = ("autocast", "bfloat16")


def make_model(form: str, precision: str, shape: Shape, device: torch.device) -> PreTrainedModel:
    """Like Qwen3-1.7B, but for layers: heads of 128, two of queries to one of keys, feed-forward of three widths."""
    heads = max(1, shape.width // 128)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=shape.width,
                intermediate_size=3 * shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=heads,
                num_key_value_heads=max(1, heads // 2),
                head_dim=128,
                max_position_embeddings=shape.length,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    if form == "attached":
        attach(model)
    elif form == "plain16":
        model.get_input_embeddings().register_forward_hook(lambda module, args, x: x.to(torch.bfloat16))
    return model


@contextlib.contextmanager
def training_step(
    model: PreTrainedModel, run: str, precision: str, shape: Shape, device: torch.device
) -> Iterator[Callable[[], Tensor]]:
    """The step of a model, which returns the loss."""
    torch._dynamo.reset()
    torch.manual_seed(0)  # making the model drew numbers, more of them with connections
    ids = torch.randint(VOCABULARY, (shape.batch, shape.length), device=device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-5, (0.9, 0.95), fused=True)
    model.train()
    call: nn.Module = model
    if run == "block":
        for layer in model.model.layers:
            layer.compile()
    elif run == "compile":
        call = torch.compile(model)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    yield step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(form: str, run: str, precision: str, shape: Shape, device: torch.device, seconds: float) -> dict:
    """The figures of a model that runs in one way."""
    cuda = device.type == "cuda"
    model = make_model(form, precision, shape, device)
    with training_step(model, run, precision, shape, device) as step:
        begin = time.perf_counter()
        loss = step().item()
        first = time.perf_counter() - begin
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(step, device, seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": round(ms, 3),
        "tokens_per_s": round(shape.tokens / ms * 1e3),
        "peak_gib": "" if peak is None else round(peak, 2),
        "first_step_s": round(first, 1),
        "loss": round(loss, 4),
        "bytes": connection_bytes(model, shape),
    }


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--model", default="16x2048:4", help="layers x width : sequences")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="what to measure, in this order")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="how")
    p.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="in which dtypes")
    args = p.parse_args()
    device, shape = torch.device(args.device), Shape.parse(args.model, 4, args.length)
    speed = copy_gb_per_s(2**28 if device.type == "cuda" else 2**22, torch.bfloat16, device, 0.2)
    for precision in args.precisions:
        for run in args.runs:
            plain: list[float] = []
            for form in args.models:
                if form == "plain16" and precision != "autocast":
                    continue
                figures = measure(form, run, precision, shape, device, args.seconds)
                moved = figures.pop("bytes")
                names = {"model": f"qwen3 {shape}", "method": f"{form}-{run}", "precision": precision}
                row = {**names, "batch": shape.batch, "length": shape.length, **figures}
                if form != "attached":
                    plain.append(row["ms"])
                best = min(plain, default=None)
                row["throughput_of_twin"] = round(best / row["ms"], 3) if best else ""
                for kind, size in zip(("rmw", "deferred"), moved, strict=True):
                    row[f"bound_{kind}"] = round(best / (best + size / speed / 1e6), 3) if best else ""
                row["copy_gb_per_s"] = round(speed)
                print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
                write_rows([row], args.csv, device)


if __name__ == "__main__":
    main()
