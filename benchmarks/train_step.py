"""One training step (forward, loss, backward, fused AdamW) of a MUDDFormer beside its plain twin, in one run.

bfloat16 autocast over float32 parameters, vocabulary 50304. Methods: a model and how it runs, joined by a dash.
    models: plain (our Transformer++), mudd (ours), prepost (ours with PrePostDANorm), 2x2 (ours, k x p = 2 x 2), naive
    (the same MUDDFormer with its connections written in plain PyTorch), llama (Hugging Face's LlamaForCausalLM)
    runs: compile (torch.compile of the whole model), block (of every block), eager

    python benchmarks/train_step.py --models 12x1024 --batch 8 --csv benchmarks/results/h100_train_step.csv
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from common import median_ms, parser, reference, write_rows
from torch import Tensor, nn

import muddformer.nn
from muddformer import MUDDFormerConfig, build_model
from muddformer.training.optim import parameter_groups

VOCABULARY = 50304
FORMS = {
    "plain": {"dense": False},
    "mudd": {},
    "prepost": {"pre_norm": True, "post_norm": "residual"},
    "2x2": {"source_stride": 2, "block_stride": 2},
    "naive": {},
}


def feed_forward(width: int) -> int:
    """8/3 of the width, up to a multiple of 256."""
    return (8 * width // 3 + 255) // 256 * 256


def make_model(form: str, layers: int, width: int, length: int) -> nn.Module:
    """A model that is called with token ids and targets and returns a loss or an output that has one."""
    heads = width // 128 if width >= 2048 else width // 64
    if form == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=feed_forward(width),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=length,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    config = MUDDFormerConfig(
        vocab_size=VOCABULARY,
        block_size=length,
        n_layer=layers,
        dim=width,
        n_head=heads,
        intermediate_size=feed_forward(width),
        use_qk_norm=True,
        ffn_reallocation=False,
        **FORMS[form],
    )
    return build_model(config)


@contextlib.contextmanager
def naive_connections(active: bool) -> Iterator[None]:
    """Replaces the connections' operators by their formulation in plain PyTorch."""
    if not active:
        yield
        return

    def weights(x: Tensor, w1: Tensor, w2: Tensor, prior: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return reference.connection_weights(x, w1, w2, prior, **options), x

    def aggregate(hiddens: list[Tensor], w: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return reference.depth_aggregate(hiddens, w), hiddens

    with (
        mock.patch.object(muddformer.nn.ops, "connection_weights_chained", weights),
        mock.patch.object(muddformer.nn.ops, "depth_aggregate_chained", aggregate),
        mock.patch.object(muddformer.nn.DepthAggregation, "_fused_norms", lambda *_: None),
    ):
        yield


def measure(
    method: str, layers: int, width: int, batch: int, length: int, device: torch.device, seconds: float
) -> dict[str, object]:
    """The row of one method."""
    form, run = method.split("-")
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device(device):
        model = make_model(form, layers, width, length)
    parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(0)  # making the model drew numbers too, more of them with connections
    ids, targets = (torch.randint(VOCABULARY, (batch, length), device=device) for _ in range(2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-5, (0.9, 0.95), fused=True)

    def loss_of() -> Tensor:
        return model(input_ids=ids, labels=ids).loss if form == "llama" else model(ids, targets)

    call: Callable[[], Tensor] = loss_of
    if run == "compile":
        call = torch.compile(loss_of)
    elif run == "block":
        for layer in model.layers:
            layer.compile()

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = call()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    with naive_connections(form == "naive"):
        begin = time.perf_counter()
        loss = step().item()
        first = time.perf_counter() - begin
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(step, device, seconds)
    tokens = batch * length
    # 6 a parameter that multiplies, and causal attention forward and backward.
    flops = 6 * (parameters - VOCABULARY * width) * tokens + 6 * layers * width * length * tokens
    return {
        "model": f"{layers}x{width}",
        "method": method,
        "batch": batch,
        "length": length,
        "parameters": parameters,
        "ms": round(ms, 2),
        "tokens_per_s": round(tokens / ms * 1e3),
        "mfu": round(flops / ms / 1e-3 / 989e12, 3) if device.type == "cuda" else "",
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else "",
        "first_step_s": round(first, 1),
        "loss": round(loss, 4),
    }


def main() -> None:
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--models", nargs="+", default=["12x1024"], help="layers x width")
    p.add_argument("--batch", type=int, default=8, help="sequences")
    p.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    p.add_argument("--methods", nargs="+", default=["plain-compile", "mudd-compile"], help="model-run, see above")
    args = p.parse_args()
    device = torch.device(args.device)
    for name in args.models:
        layers, width = map(int, name.split("x"))
        plain = None
        for method in args.methods:
            row = measure(method, layers, width, args.batch, args.length, device, args.seconds)
            plain = row if method == "plain-compile" else plain
            row["throughput_of_plain"] = round(plain["ms"] / row["ms"], 3) if plain else ""
            memory = plain and plain["peak_gib"] and round(row["peak_gib"] / plain["peak_gib"], 3)
            row["memory_of_plain"] = memory or ""
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write_rows([row], args.csv, device)


if __name__ == "__main__":
    main()
