"""transformers' generate beside our own eager decoding, and a step of its Trainer beside our loop, of one model.

Both sides run the same modules. Decoding: greedy, new tokens per second of one prompt, without torch.compile and CUDA
graphs. Training: AdamW with torch's fused kernel, gradients clipped, one batch a step; a step is the time of a run of
steps, without its first ones, by their number. Trainer's look at every loss for NaN, which waits for the device, is
off, as our loop has none. Both sides in turns within one process, medians. Beside each figure stands the speed that
transformers is to have of ours.

    python benchmarks/hf.py --csv benchmarks/results/h100_hf.csv
    python benchmarks/hf.py --layers 4 --dim 256 --vocab 2048 --length 128 --tokens 32    (on a CPU)
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import parser, write_rows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import muddformer
import muddformer.hf

TARGETS = {"decode": 0.9, "train_step": 0.97}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Any, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def decoding(ours: nn.Module, theirs: nn.Module, args: Any, device: torch.device) -> list[dict]:
    """Tokens per second of both, after a check that their tokens are equal."""
    prompt = torch.randint(args.vocab, (1, 16), device=device)
    new = {"max_new_tokens": args.tokens}

    def own() -> Tensor:
        return muddformer.generate(ours, prompt, temperature=0, cuda_graph=False, **new)

    def foreign() -> Tensor:
        return theirs.generate(prompt, do_sample=False, eos_token_id=None, pad_token_id=0, **new)

    calls = {"ours": own, "transformers": foreign}
    if device.type == "cpu" and not torch.equal(own(), foreign()):
        raise RuntimeError("the tokens differ")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.turns + 1):
        for name, call in calls.items():
            taken = seconds_of(call, device)
            if turn:
                times[name].append(taken)
    return rows("decode", "tokens_per_s", {name: args.tokens / statistics.median(t) for name, t in times.items()})


WARM = 3  # steps that do not count


class Clock(TrainerCallback):
    """Times a run of optimizer steps; the device is waited for at its ends alone, as in a run without a clock."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.done = device, steps, 0
        self.begin = self.seconds = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done += 1
        if self.done == WARM:
            synchronize(self.device)
            self.begin = time.perf_counter()
        elif self.done == self.steps:
            synchronize(self.device)
            self.seconds = (time.perf_counter() - self.begin) / (self.steps - WARM)


def step_of_trainer(model: nn.Module, data: list[dict[str, Tensor]], args: Any, device: torch.device) -> float:
    clock = Clock(device, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            optim="adamw_torch_fused",
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            lr_scheduler_type="constant",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
        )
        Trainer(model=model, args=settings, train_dataset=data, callbacks=[clock]).train()
    return clock.seconds


def step_of_ours(model: nn.Module, data: list[dict[str, Tensor]], args: Any, device: torch.device) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    ids = torch.stack([row["input_ids"] for row in data]).split(args.batch)
    clock = Clock(device, args.steps)
    for step in range(args.steps):
        batch = ids[step % len(ids)].to(device)
        cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
        with cast:
            loss = model(batch, targets=F.pad(batch[:, 1:], (0, 1), value=-100))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return clock.seconds


def training(ours: nn.Module, theirs: nn.Module, args: Any, device: torch.device) -> list[dict]:
    """Milliseconds of a step of both, of as many positions, the last of which has no label."""
    count = args.batch * args.steps
    data = [{"input_ids": row, "labels": row} for row in torch.randint(args.vocab, (count, args.length))]
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(args.turns):
        times["ours"].append(step_of_ours(ours.train(), data, args, device))
        times["transformers"].append(step_of_trainer(theirs.train(), data, args, device))
    return rows("train_step", "ms", {name: 1e3 * statistics.median(t) for name, t in times.items()})


def rows(figure: str, unit: str, values: dict[str, float]) -> list[dict]:
    """A row for each side; ``speed`` is that of transformers over ours."""
    speed = values["transformers"] / values["ours"]
    speed = speed if unit == "tokens_per_s" else 1 / speed
    print(f"{figure:<11}" + "".join(f" {name} {value:.2f} {unit}" for name, value in values.items()) + f"  {speed:.3f}")
    names = {"figure": figure, "unit": unit, "speed": round(speed, 3), "target": TARGETS[figure]}
    return [{**names, "method": name, "value": round(value, 3)} for name, value in values.items()]


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--layers", type=int, default=24, help="number of blocks")
    p.add_argument("--dim", type=int, default=1024, help="model width D")
    p.add_argument("--vocab", type=int, default=50304, help="vocabulary")
    p.add_argument("--batch", type=int, default=8, help="sequences of a training step")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    p.add_argument("--steps", type=int, default=13, help="training steps of a turn, the first 3 uncounted")
    p.add_argument("--turns", type=int, default=5, help="turns of both sides")
    p.add_argument("--figures", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to measure")
    args = p.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    sizes = {"n_layer": args.layers, "dim": args.dim, "n_head": args.dim // 64, "vocab_size": args.vocab}
    config = muddformer.MUDDFormerConfig(**sizes, block_size=max(args.length, 16 + args.tokens))
    ours = muddformer.build_model(config, device=device)

    def foreign() -> nn.Module:
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict())).to(device)
        made.load_state_dict(ours.state_dict())
        return made

    shape = {"layers": args.layers, "D": args.dim, "batch": args.batch, "length": args.length}
    shape["transformers"] = transformers.__version__
    if "train_step" in args.figures:
        found = training(ours, foreign(), args, device)
        write_rows([{**shape, **row} for row in found], args.csv, device)
    if "decode" in args.figures:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # A model of its own: what Trainer has trained keeps its forward under autocast.
        theirs = foreign().to(dtype).eval()
        with torch.no_grad():
            found = decoding(ours.to(dtype).eval(), theirs, args, device)
        write_rows([{**shape, **row} for row in found], args.csv, device)


if __name__ == "__main__":
    main()
