"""Small models of every variant."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from muddformer import MUDDFormer, MUDDFormerConfig, build_model

SMALL = {
    "n_layer": 5, "dim": 32, "n_head": 4, "vocab_size": 61, "intermediate_size": 48, "block_size": 24,
    "ffn_reallocation": False, "rotary_pct": 1.0,
}  # fmt: skip

VARIANTS = {
    "default": {},
    "pythia": {"model_type": "muddpythia", "rotary_pct": 0.5},
    "pythia-sequential": {"model_type": "muddpythia", "use_parallel_residual": False, "use_linear_bias": False},
    "parallel-biased": {"use_parallel_residual": True, "use_linear_bias": True},
    "plain": {"dense": False},
    "plain-pythia": {"dense": False, "model_type": "muddpythia"},
    "static": {"dynamic": False},
    "denseformer": {"dynamic": False, "multiway": False},
    "one-way": {"multiway": False},
    "static-cap": {"dynamic": False, "cap": 3.0},
    "cap": {"cap": 10.0},
    "tanh": {"gelu_approximate": "tanh", "model_type": "muddpythia"},
    "ways-qkv": {"ways": "qkv"},
    "ways-v": {"ways": "v"},
    "ways-r": {"ways": "r"},
    "ways-rq": {"ways": "rq", "pre_norm": True, "post_norm": "residual"},
    "stride-2x2": {"source_stride": 2, "block_stride": 2},
    "stride-3x2-norms": {"source_stride": 3, "block_stride": 2, "pre_norm": True, "post_norm": "residual"},
    "stride-1x3-one-way": {"block_stride": 3, "multiway": False},
    "stride-beyond": {"source_stride": 9, "block_stride": 9},
    "window-1": {"window": 1},
    "window-2": {"window": 2, "source_stride": 2},
    "window-beyond": {"window": 50},
    "pre-post": {"pre_norm": True, "post_norm": "residual"},
    "pre-post-all": {"pre_norm": True, "post_norm": "all"},
    "pre": {"pre_norm": True},
    "post": {"post_norm": "residual"},
    "pre-post-static": {"pre_norm": True, "post_norm": "residual", "dynamic": False},
    "pre-post-one-way": {"pre_norm": True, "post_norm": "all", "multiway": False},
    "shared-norms": {"separate_norms": False},
    "flush-2": {"flush_interval": 2},
    "flush-3-norms": {"flush_interval": 3, "pre_norm": True, "post_norm": "residual"},
    "narrow": {"expand_last": False, "round64": False},
    "no-qk-norm": {"use_qk_norm": False},
    "gqa": {"n_kv_heads": 2},
    "mqa-tied": {"n_kv_heads": 1, "tie_word_embeddings": True},
    "reallocation": {"ffn_reallocation": True, "intermediate_size": 256},
    "one-layer": {"n_layer": 1, "ffn_reallocation": True},
}


def make(variant: str = "default", **changes) -> MUDDFormer:
    return build_model(MUDDFormerConfig(**{**SMALL, **VARIANTS[variant], **changes}))


Module = TypeVar("Module", bound=nn.Module)


def scramble(module: Module, alpha: float = 0.2) -> Module:
    """Moves every parameter off its initial value, so that each one counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=alpha)
    return module


def some_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length))
