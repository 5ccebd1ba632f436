"""What the benchmarks of a training step share: the models, ways to run them, and what a step costs at least."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import muddformer.nn
from muddformer import MUDDFormerConfig, build_model
from muddformer.nn import DepthAggregation
from muddformer.nn.naive import naive_connections
from muddformer.training.optim import parameter_groups

VOCABULARY = 50304
FORMS = {
    "plain": {"dense": False},
    "plain16": {"dense": False, "residual_dtype": "autocast"},
    "mudd": {},
    "prepost": {"pre_norm": True, "post_norm": "residual"},
    "2x2": {"source_stride": 2, "block_stride": 2},
    "naive": {},
}
TWINS = ("plain", "plain16")
OTHERS = ("llama", "reference")
RUNS = ("compile", "block", "eager", "graphs", "ckpt", "selective")
KEPT = [  # by selective checkpointing: matrix products and attention; all else is computed again
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
] + [torch.ops.muddformer.linear_forward.default]
selective_contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)


@dataclass(frozen=True)
class Shape:
    """Layers x width of a model, and sequences x tokens of a batch."""

    layers: int
    width: int
    batch: int
    length: int

    @classmethod
    def parse(cls, text: str, batch: int, length: int) -> Shape:
        """From LAYERSxWIDTH or LAYERSxWIDTH:BATCH."""
        found = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
        if not found:
            raise SystemExit(f"--models must be LAYERSxWIDTH or LAYERSxWIDTH:BATCH, got {text!r}")
        return cls(int(found[1]), int(found[2]), int(found[3] or batch), length)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def heads(self) -> int:
        return max(1, self.width // 128 if self.width >= 2048 else self.width // 64)

    @property
    def feed_forward(self) -> int:
        """8/3 of the width, up to a multiple of 256."""
        return (8 * self.width // 3 + 255) // 256 * 256

    def __str__(self) -> str:
        return f"{self.layers}x{self.width}"


@dataclass(frozen=True)
class Method:
    """A model and how it runs, from MODEL-RUN or MODEL+FIELD=VALUE-RUN, fields being those of MUDDFormerConfig."""

    text: str
    form: str
    fields: dict[str, object]
    run: str

    @classmethod
    def parse(cls, text: str) -> Method:
        model, _, run = text.rpartition("-")
        form, *settings = model.split("+")
        if run not in RUNS or form not in (*FORMS, *OTHERS) or (settings and form in OTHERS):
            raise SystemExit(
                f"a method must be MODEL-RUN, MODEL one of {', '.join((*FORMS, *OTHERS))} and RUN one of "
                f"{', '.join(RUNS)}, or MODEL+FIELD=VALUE-RUN for a model of ours, got {text!r}"
            )
        fields = dict(setting.partition("=")[::2] for setting in settings)
        try:
            return cls(text, form, {name: json.loads(value) for name, value in fields.items()}, run)
        except json.JSONDecodeError as error:
            raise SystemExit(f"values of {text!r} must be JSON (2, false, null, a word in quotes): {error}") from error


def make_model(method: Method, shape: Shape, reference_path: Path | None = None) -> nn.Module:
    """A model that is called with token ids and targets and returns a loss or an output that has one."""
    if method.form == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=shape.width,
                intermediate_size=shape.feed_forward,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                max_position_embeddings=shape.length,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    if method.form == "reference":
        if reference_path is None:
            raise SystemExit("the model 'reference' needs --reference PATH")
        spec = importlib.util.spec_from_file_location("reference_model", reference_path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks for it
        spec.loader.exec_module(module)
        return module.Model(VOCABULARY, shape.width, shape.layers, shape.heads, ffn=shape.feed_forward)
    return build_model(model_config(method, shape))


def model_config(method: Method, shape: Shape) -> MUDDFormerConfig:
    """Of a model of ours."""
    fields = {
        "vocab_size": VOCABULARY,
        "block_size": shape.length,
        "n_layer": shape.layers,
        "dim": shape.width,
        "n_head": shape.heads,
        "intermediate_size": shape.feed_forward,
        "use_qk_norm": True,
        "ffn_reallocation": False,
    }
    return MUDDFormerConfig(**{**fields, **FORMS[method.form], **method.fields})


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model of any form: its first list of modules."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m))


def _checkpoint_blocks(model: nn.Module, selective: bool) -> None:
    """Activation checkpointing of every block, as each kind of model has it."""
    options = {"context_fn": selective_contexts} if selective else {}
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
    elif isinstance(model, muddformer.nn.MUDDStack):
        model.gradient_checkpointing = True
        model.checkpoint_context_fn = options.get("context_fn")
    else:
        for block in blocks_of(model):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


@contextlib.contextmanager
def training_step(
    method: Method, shape: Shape, device: torch.device, reference_path: Path | None = None, autocast: bool = True
) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """A fresh model and its step: forward, loss, backward, fused AdamW; it returns the loss.

    autocast: the forward in bfloat16.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device(device):
        model = make_model(method, shape, reference_path)
    torch.manual_seed(0)  # making the model drew numbers too, more of them with connections
    ids, targets = (torch.randint(VOCABULARY, (shape.batch, shape.length), device=device) for _ in range(2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-5, (0.9, 0.95), fused=True)

    def loss_of() -> Tensor:
        return model(input_ids=ids, labels=ids).loss if method.form == "llama" else model(ids, targets)

    call: Callable[[], Tensor] = loss_of
    if method.run in ("compile", "graphs", "ckpt", "selective"):
        mode = "reduce-overhead" if method.run == "graphs" else None
        call = torch.compile(loss_of, mode=mode, fullgraph=method.form != "llama")

    def step() -> Tensor:
        if method.run == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = call()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    with naive_connections(method.form == "naive"):
        if method.run == "block":
            for block in blocks_of(model):
                block.compile()
        elif method.run in ("ckpt", "selective"):
            _checkpoint_blocks(model, method.run == "selective")
        yield model, step


def _aggregations(model: nn.Module) -> list[tuple[int, int]]:
    """Sources S and ways C of every aggregation."""
    return [(m.sources, m.num_ways) for m in model.modules() if isinstance(m, DepthAggregation)]


def step_flops(model: nn.Module, shape: Shape) -> float:
    """6 for every multiplication of the forward: 2 there, 4 in the backward; recomputing does not count.

    A token is multiplied with every weight of the linear layers (the head is one, the embedding is not, the generators
    of the connections are), with C * S * D connection weights in every aggregation, and in causal attention with
    L * D * T entries (keys and values, of half of the T positions each).
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    mixing = shape.width * sum(sources * ways for sources, ways in _aggregations(model))
    return 6 * shape.tokens * (linear + mixing + shape.layers * shape.width * shape.length)


def connection_bytes(model: nn.Module, shape: Shape) -> tuple[float, float]:
    """Bytes that the connections of a step must move, with read-modify-write backward and with a deferred flush.

    In units of one pass over [tokens, D] in bfloat16: forward S + C; backward 3 S + C, or with old gradients flushed
    once in G layers S + 2 C + 2 S / G + G at the best G. The generators and the norms come on top, but a norm that the
    aggregation makes is one that the plain model makes by itself, so a model can come out above its bound by a little.
    """
    unit = 2 * shape.tokens * shape.width
    chained = deferred = 0.0
    for sources, ways in _aggregations(model):
        group = max(1, round(math.sqrt(2 * sources)))
        chained += 4 * sources + 2 * ways
        deferred += 2 * sources + 3 * ways + 2 * sources / group + group
    return chained * unit, deferred * unit
