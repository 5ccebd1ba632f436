"""The public release: its published sizes, and the keys of its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._checks import check_keys, shown

__all__ = ["PRESETS", "fields_of", "is_official", "keys_of"]

PRESETS = {
    name: dict(zip(("model_type", "n_layer", "dim", "n_head", "intermediate_size"), values, strict=True))
    for name, values in {
        "MUDDFormer-2.8B": ("muddformer", 32, 2560, 32, 6912),
        "MUDDPythia-1.4B": ("muddpythia", 24, 2048, 16, 8192),
        "MUDDPythia-2.8B": ("muddpythia", 32, 2560, 32, 10240),
    }.items()
}

# Keys of the public release whose meaning is the same here, with the release's defaults (not ours).
_DEFAULTS = {
    "block_size": 2048,
    "vocab_size": 50432,
    "n_layer": 32,
    "n_head": 32,
    "dim": 2560,
    "intermediate_size": None,
    "rope_base": 10000.0,
    "norm_eps": None,
    "use_qk_norm": False,
    "rotary_pct": None,
    "use_parallel_residual": None,
    "use_linear_bias": None,
    "tie_word_embeddings": False,
    "dense": True,
    "expand_last": False,
    "round64": False,
}
_RENAMED = {"n_local_heads", "dynamic_dense", "dense_type", "sepln"}
_PYTHIA = ("rotary_pct", "use_parallel_residual", "use_linear_bias")
# Keys that say how the release runs, not what it computes. Its head_dim is always overwritten by dim // n_head.
_IGNORED = {
    "model_type", "model", "head_dim", "is_training", "use_layer_cache", "stack_hidden", "use_gradient_checkpointing",
    "pad_token_id", "bos_token_id", "eos_token_id", "architectures", "auto_map", "dtype", "torch_dtype",
    "transformers_version", "_name_or_path", "use_cache", "skip_logits",
}  # fmt: skip
# Fields that the release has no key for: written, and read, under our names.
_OURS = {
    "norm", "feed_forward", "causal", "ffn_reallocation", "initializer_range", "ways", "source_stride", "block_stride",
    "window", "pre_norm", "post_norm", "cap", "gelu_approximate", "flush_interval", "residual_dtype",
}  # fmt: skip


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`muddformer.MUDDFormerConfig` that say what these keys of the release say.

    Raises:
        TypeError, ValueError: for an unknown key, or a value that is not supported here.
    """
    known = _DEFAULTS.keys() | _RENAMED | _IGNORED | _OURS | {"window_size", "window_type"}
    check_keys(values, known, "the public release")
    for name in ("window_size", "window_type"):
        if values.get(name) is not None:
            raise ValueError(f"{name} must be None (no sliding-window attention here), got {shown(values[name])}")
    pythia_keys = any(values.get(name) is not None for name in _PYTHIA)
    families = [values[name] for name in ("model_type", "model") if values.get(name) is not None]
    family = [*families, "muddpythia" if pythia_keys else "muddformer"][0]
    dense_type = values.get("dense_type", "qkvr")
    if dense_type not in ("qkvr", "qkvm", "l"):
        raise ValueError(f"dense_type must be 'qkvr', 'qkvm' or 'l', got {shown(dense_type)}")
    kv_heads = values.get("n_local_heads")
    return {
        "model_type": family,
        "n_kv_heads": None if type(kv_heads) is int and kv_heads == -1 else kv_heads,
        "dynamic": values.get("dynamic_dense", True),
        "multiway": dense_type != "l",
        "separate_norms": values.get("sepln", True),
        **{name: values.get(name, default) for name, default in _DEFAULTS.items()},
        **{name: values[name] for name in _OURS if name in values},
    }


def keys_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The release's keys for all fields of a :class:`muddformer.MUDDFormerConfig`: :func:`fields_of` takes them back.

    What the release has no key for keeps our name.
    """
    return {
        "model_type": fields["model_type"],
        **{name: fields[name] for name in _DEFAULTS},
        "n_local_heads": fields["n_kv_heads"],
        "head_dim": fields["dim"] // fields["n_head"],
        "dynamic_dense": fields["dynamic"],
        "dense_type": "qkvr" if fields["multiway"] else "l",
        "sepln": fields["separate_norms"],
        **{name: fields[name] for name in sorted(_OURS)},
    }


def is_official(values: Mapping[str, Any]) -> bool:
    """Whether a mapping uses the keys of the public release instead of the fields of a MUDDFormerConfig."""
    return not _RENAMED.isdisjoint(values)
