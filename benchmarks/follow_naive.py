"""Training with the fast operators beside training with the naive float32 formulation of the connections.

A small model on real text (the standard library's source, byte by byte); every run sees the same text in the same
order, the seeds differ in the initial values. The losses of the fast run should equal those of the naive one over the
first steps in float32, and over all steps stay within the spread of the seeds: the mean of |fast - naive| is compared
with the mean of |naive of one seed - naive of another|. Exit code 1 if they do not.

    python benchmarks/follow_naive.py --csv benchmarks/results/follow_naive.csv
"""

from __future__ import annotations

import contextlib
import itertools

import torch
from common import parser, write_rows
from torch import Tensor

from muddformer import MUDDFormerConfig, build_model
from muddformer.nn.naive import naive_connections
from muddformer.training.corpus import find_documents
from muddformer.training.optim import parameter_groups

FIRST, TOLERANCE = 20, 1e-4


def text_bytes(count: int) -> Tensor:
    """The first bytes of the standard library's source, int64 [count]."""
    data = bytearray()
    for document in find_documents(()):
        for chunk in document.chunks():
            data += chunk
        if len(data) >= count:
            break
    return torch.frombuffer(data[:count], dtype=torch.uint8).long()


def training_losses(
    config: MUDDFormerConfig,
    *,
    steps: int,
    seed: int,
    naive: bool,
    batch: int = 8,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> list[float]:
    """The loss of every step of a run that sees the same text in the same order whatever its other arguments.

    Args:
        config: of the model, over bytes.
        seed: of the initial values.
        naive: connections in plain PyTorch, their gradients added up by autograd.
        autocast: dtype to run under autocast; None: float32.
    """
    text = text_bytes(1 << 20)
    starts = torch.randint(len(text) - config.block_size, (steps, batch), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    model = build_model(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-3, (0.9, 0.95))
    losses = []
    with naive_connections(naive):
        for step in range(steps):
            rows = torch.stack([text[i : i + config.block_size + 1] for i in starts[step].tolist()]).to(device)
            with torch.autocast(torch.device(device).type, autocast) if autocast else contextlib.nullcontext():
                loss = model(rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def mean_distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=200, help="training steps")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds, two at least")
    p.add_argument("--layers", type=int, default=6, help="of the model")
    p.add_argument("--width", type=int, default=128, help="of the model")
    p.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    p.add_argument("--batch", type=int, default=8, help="sequences")
    args = p.parse_args()
    if len(set(args.seeds)) < 2:
        p.error("--seeds must be two different seeds at least")
    config = MUDDFormerConfig(
        vocab_size=256, block_size=args.length, n_layer=args.layers, dim=args.width, n_head=4, intermediate_size=None,
        ffn_reallocation=False,
    )  # fmt: skip
    device = torch.device(args.device)
    common = {"steps": args.steps, "batch": args.batch, "device": device}
    naive = {seed: training_losses(config, seed=seed, naive=True, **common) for seed in args.seeds}
    spread = min(mean_distance(naive[a], naive[b]) for a, b in itertools.combinations(args.seeds, 2))
    good = True
    for dtype in ("float32", *(["bfloat16"] if device.type == "cuda" else [])):
        autocast = None if dtype == "float32" else torch.bfloat16
        for seed in args.seeds:
            fast = training_losses(config, seed=seed, naive=False, autocast=autocast, **common)
            first = max(abs(a - b) for a, b in zip(fast[:FIRST], naive[seed][:FIRST], strict=True))
            mean = mean_distance(fast, naive[seed])
            follows = mean <= spread and (dtype != "float32" or first <= TOLERANCE)
            good &= follows
            print(
                f"{dtype}, seed {seed}: last loss {fast[-1]:.4f}, naive {naive[seed][-1]:.4f}; |fast - naive| at most "
                f"{first:.1e} in the first {FIRST} steps, {mean:.1e} in the mean of {args.steps}, seeds differ by "
                f"{spread:.1e}: {'follows' if follows else 'DOES NOT FOLLOW'}",
                flush=True,
            )
            rows = [
                {"dtype": dtype, "seed": seed, "step": step, "naive": round(slow, 6), "fast": round(quick, 6)}
                for step, (slow, quick) in enumerate(zip(naive[seed], fast, strict=True), start=1)
            ]
            write_rows(rows, args.csv, device)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
