"""One training step of a Qwen3-shaped model of transformers, with attached MUDD connections and without, in turns.

Forward, loss, backward and fused AdamW. Models: plain (as transformers makes it), plain16 (its residual stream in
bfloat16, as an attached model has it; under autocast alone) and attached. Runs: eager, block (torch.compile of every
decoder layer), compile (of the whole model). Precisions: autocast (bfloat16 over float32 parameters) and bfloat16
(parameters too). The models of one run and precision lie on the device together and take turns; medians count. The
ratio is to the faster one of the plain models; bound_rmw and bound_deferred are what the bytes of the connections, at
the speed of a copy, allow at best (benchmarks/training.py has the formulas), target is what is to be reached.

    python benchmarks/hf_attach.py --model 16x2048:4 --csv benchmarks/results/h100_hf_attach.csv
    python benchmarks/hf_attach.py --model 3x128:1 --length 64 --seconds 0.2    (on a CPU)
"""

from __future__ import annotations

import gc
import statistics
import time

import torch
import transformers
from common import copy_gb_per_s, parser, samples_ms, write_rows
from torch import Tensor, nn
from training import VOCABULARY, Shape, connection_bytes
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from muddformer.hf import attach
from muddformer.training.optim import parameter_groups

MODELS = ("plain", "plain16", "attached")
RUNS = ("eager", "block", "compile")
PRECISIONS = ("bfloat16", "autocast")
TARGET = 0.88


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


class Step:
    """The training step of a model that runs in one way; called, it returns the loss.

    Attributes:
        own_bytes: memory that stays allocated between steps: parameters and the optimizer's state.
        first_s: seconds of the first step, with whatever is compiled in it.
    """

    def __init__(self, form: str, run: str, precision: str, shape: Shape, device: torch.device) -> None:
        before = allocated(device)
        self.form, self.precision, self.device = form, precision, device
        self.model = make_model(form, precision, shape, device).train()
        torch.manual_seed(0)  # making the model drew numbers, more of them with connections
        self.ids = torch.randint(VOCABULARY, (shape.batch, shape.length), device=device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), 1e-5, (0.9, 0.95), fused=True)
        self.call: nn.Module = self.model
        if run == "block":
            for layer in self.model.model.layers:
                layer.compile()
        elif run == "compile":
            self.call = torch.compile(self.model)
        begin = time.perf_counter()
        self.loss = self().item()
        self.first_s = time.perf_counter() - begin
        self().item()
        self.own_bytes = allocated(device) - before

    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
            loss = self.call(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def peak_gib(self) -> float | None:
        """Peak memory of a step, without that of the other models."""
        if self.device.type != "cuda":
            return None
        others = allocated(self.device) - self.own_bytes
        torch.cuda.reset_peak_memory_stats()
        self()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - others) / 2**30, 2)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def measure(
    forms: list[str], run: str, precision: str, shape: Shape, device: torch.device, seconds: float, turns: int
) -> list[dict]:
    """A row for each model of a run, timed in turns."""
    torch._dynamo.reset()
    steps = [Step(form, run, precision, shape, device) for form in forms]
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(turns):
        for step, own in zip(steps, times, strict=True):
            own += samples_ms(step, device, seconds / turns)
    speed = copy_gb_per_s(2**28 if device.type == "cuda" else 2**22, torch.bfloat16, device, 0.2)
    medians = [statistics.median(own) for own in times]
    plain = min((ms for step, ms in zip(steps, medians, strict=True) if step.form != "attached"), default=None)
    rows = []
    for step, own, ms in zip(steps, times, medians, strict=True):
        low, _, high = statistics.quantiles(own, n=4)
        rmw, deferred = (
            round(plain / (plain + size / speed / 1e6), 3) if plain else ""
            for size in connection_bytes(step.model, shape)
        )
        peak, attached = step.peak_gib(), step.form == "attached"
        rows.append(
            {
                "model": f"qwen3 {shape}",
                "method": f"{step.form}-{run}",
                "precision": precision,
                "batch": shape.batch,
                "length": shape.length,
                "parameters": sum(p.numel() for p in step.model.parameters()),
                "ms": round(ms, 3),
                "quartiles_ms": f"{low:.3f} {high:.3f}",
                "tokens_per_s": round(shape.tokens / ms * 1e3),
                "peak_gib": "" if peak is None else peak,
                "first_step_s": round(step.first_s, 1),
                "loss": round(step.loss, 4),
                "throughput_of_twin": round(plain / ms, 3) if plain else "",
                "target": TARGET if attached else "",
                "bound_rmw": rmw,
                "bound_deferred": deferred,
                "copy_gb_per_s": round(speed),
                "transformers": transformers.__version__,
            }
        )
    return rows


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--model", default="16x2048:4", help="layers x width : sequences")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="what to measure")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="how")
    p.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="in which dtypes")
    p.add_argument("--turns", type=int, default=4, help="turns of the models of a run")
    args = p.parse_args()
    device, shape = torch.device(args.device), Shape.parse(args.model, 4, args.length)
    for precision in args.precisions:
        forms = [form for form in args.models if form != "plain16" or precision == "autocast"]
        for run in args.runs:
            rows = measure(forms, run, precision, shape, device, args.seconds, args.turns)
            for row in rows:
                print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
            write_rows(rows, args.csv, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
