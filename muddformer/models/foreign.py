"""Checkpoints of other architectures that a plain model can express: transformers' GPT-NeoX (Pythia) and Llama.

What such a configuration says is turned into the fields of a :class:`MUDDFormerConfig` without connections, and the
tensors into those of the model it describes. What has no place in our models is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .config import MUDDFormerConfig
from .stored import StoredTensor

__all__ = ["FOREIGN", "Foreign", "check_rope"]


class Foreign(NamedTuple):
    """An architecture of transformers.

    Attributes:
        fields: from the keys of its ``config.json`` to the fields of a plain :class:`MUDDFormerConfig`. Raises
            ValueError for what is not expressible, naming the key.
        rename: from its tensors by name to ours. Names that it does not know stay as they are.
    """

    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    rename: Callable[[Mapping[str, StoredTensor], MUDDFormerConfig], dict[str, StoredTensor]]


_ERF = ("gelu", "gelu_python")
_TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
_PLAIN = {"dense": False, "multiway": True, "ffn_reallocation": False, "use_qk_norm": False}


def _neox_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    _expect(values, "hidden_act", "gelu", *_ERF, *_TANH)
    _expect(values, "attention_bias", True, True)  # the feed-forward network always has biases
    rotary = _rotary(values, theta="rotary_emb_base", part="rotary_pct", default_part=0.25)
    return {
        **_PLAIN,
        **_sizes(values),
        **rotary,
        "model_type": "muddpythia",
        "norm_eps": values.get("layer_norm_eps", 1e-5),
        "gelu_approximate": "tanh" if values.get("hidden_act") in _TANH else "none",
        "use_parallel_residual": values.get("use_parallel_residual", True),
    }


def _llama_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    _expect(values, "hidden_act", "silu", "silu", "swish")
    biases = [values.get(name, False) for name in ("attention_bias", "mlp_bias")]
    if biases[0] is not biases[1]:
        raise ValueError(f"attention_bias and mlp_bias must be equal, got {biases[0]!r} and {biases[1]!r}")
    sizes = _sizes(values)
    if values.get("head_dim") is not None and values["head_dim"] * sizes["n_head"] != sizes["dim"]:
        raise ValueError(
            f"head_dim must be hidden_size / num_attention_heads, got {values['head_dim']!r} with "
            f"{sizes['dim']} / {sizes['n_head']}"
        )
    return {
        **_PLAIN,
        **sizes,
        **_rotary(values, theta="rope_theta", part="partial_rotary_factor", default_part=1.0),
        "model_type": "muddformer",
        "n_kv_heads": values.get("num_key_value_heads"),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "use_linear_bias": biases[0],
    }


_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "intermediate_size",
}


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """What both architectures call by the same names."""
    for name in _SIZES:
        if type(values.get(name)) is not int:
            raise ValueError(f"{name} must be an integer, got {values.get(name)!r}")
    if values.get("quantization_config") is not None:
        raise ValueError("quantization_config must be None: convert the checkpoint before it was quantised")
    return {
        **{ours: values[name] for name, ours in _SIZES.items()},
        "block_size": values.get("max_position_embeddings", 2048),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "initializer_range": values.get("initializer_range", 0.02),
    }


def _rotary(values: Mapping[str, Any], theta: str, part: str, default_part: float) -> dict[str, Any]:
    """Base and rotated part: in ``rope_parameters`` since version 5, before that in others."""
    rope = check_rope(values.get("rope_scaling") or values.get("rope_parameters"))
    return {
        "rope_base": rope.get("rope_theta", values.get(theta, 10000.0)),
        "rotary_pct": rope.get("partial_rotary_factor", values.get(part, default_part)),
    }


def check_rope(rope: Any) -> Mapping[str, Any]:
    """What transformers calls ``rope_parameters`` (None: an empty mapping), if our models can express it.

    Raises:
        ValueError: if it is no mapping, or of another ``rope_type`` than the default.
    """
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type must be 'default' (no scaling of rotary positions here), got {kind!r}")
    return rope


def _expect(values: Mapping[str, Any], name: str, default: Any, *choices: Any) -> None:
    value = values.get(name, default)
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{name} must be {expected} to be expressible here, got {value!r}")


_NEOX = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.dense": "attention.wo",
    "mlp.dense_h_to_4h": "feed_forward.w1",
    "mlp.dense_4h_to_h": "feed_forward.w2",
}
_LLAMA = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{way}_proj": f"attention.w{way}" for way in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_OUTSIDE = {
    "gpt_neox.embed_in": "tok_embeddings",
    "gpt_neox.final_layer_norm": "norm",
    "embed_out": "output",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
# Tables that old versions of transformers saved among the weights.
_TABLES = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq")


def _rename(
    tensors: Mapping[str, StoredTensor], config: MUDDFormerConfig, parts: Mapping[str, str]
) -> dict[str, StoredTensor]:
    renamed = {}
    for name, tensor in tensors.items():
        outside, _, kind = name.rpartition(".")
        found = re.fullmatch(r"(?:gpt_neox|model)\.layers\.(\d+)\.(.+)", name)
        block, inside = (f"layers.{found[1]}.", found[2]) if found else ("", "")
        part = inside.rpartition(".")[0]
        if outside in _OUTSIDE:
            renamed[f"{_OUTSIDE[outside]}.{kind}"] = tensor
        elif part in parts:
            renamed[f"{block}{parts[part]}.{kind}"] = tensor
        elif part == "attention.query_key_value":
            for place, way in enumerate("qkv"):
                renamed[f"{block}attention.w{way}.{kind}"] = tensor.map(_one_of_three(config, place))
        elif inside not in _TABLES:
            renamed[name] = tensor
    return renamed


def _one_of_three(config: MUDDFormerConfig, place: int) -> Callable[[Tensor], Tensor]:
    """Queries, keys or values of a GPT-NeoX matrix or bias, which has those of each head together."""
    return lambda value: value.unflatten(0, (config.n_head, 3, config.head_dim))[:, place].flatten(0, 1)


FOREIGN: dict[str, Foreign] = {
    "gpt_neox": Foreign(_neox_fields, lambda tensors, config: _rename(tensors, config, _NEOX)),
    "llama": Foreign(_llama_fields, lambda tensors, config: _rename(tensors, config, _LLAMA)),
}
"""By the ``model_type`` of their ``config.json``. One more is one line."""
