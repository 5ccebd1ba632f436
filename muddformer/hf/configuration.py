"""The configurations of the models for transformers: the public release's keys, and ours are read too."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from ..models import MUDDFormerConfig as ModelConfig
from ..models import release
from ..models.foreign import check_rope

__all__ = ["CONFIGS", "MUDDFormerConfig", "MUDDPythiaConfig"]

_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)} - {"model_type"}
_RELEASE = release.keys_of(ModelConfig(n_layer=1).to_dict()).keys() - {"model_type"}
# How transformers calls our fields.
_STANDARD = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_local_heads",
    "max_position_embeddings": "block_size",
}


def _rope_fields(rope: dict[str, Any] | None) -> dict[str, Any]:
    """What transformers' rotary parameters say, by the names of our fields."""
    rope = check_rope(rope)
    names = {"rope_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    return {own: rope[name] for own, name in names.items() if rope.get(name) is not None}


class MUDDFormerConfig(PretrainedConfig):
    """What a MUDDFormer computes, for transformers.

    Args:
        skip_logits: a training forward with labels makes the loss without the logits of all tokens in memory, and
            returns none.
        values: keys of the public release, or fields of :class:`muddformer.MUDDFormerConfig`, whose defaults each has;
            and whatever transformers keeps in a configuration. transformers' standard names (``hidden_size``,
            ``num_hidden_layers``, ...) stand for either.

    Raises:
        TypeError, ValueError: naming the key, what was expected and what came.
    """

    model_type = "muddformer"
    attribute_map = _STANDARD
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  (as transformers declares it)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.attention.wq": "colwise",
        "layers.*.attention.wk": "colwise",
        "layers.*.attention.wv": "colwise",
        "layers.*.attention.wo": "rowwise",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
    }
    base_model_fsdp_plan = {  # noqa: RUF012
        "tok_embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    def __init__(self, *, skip_logits: bool = True, **values: Any) -> None:
        came = values.pop("model_type", self.model_type)
        if came != self.model_type:
            known = " or ".join(repr(name) for name in CONFIGS)
            raise ValueError(
                f"model_type must be {self.model_type!r} for a {type(self).__name__}, got {came!r}: "
                f"AutoModelForCausalLM finds the class of a directory, after import muddformer.hf for {known}"
            )
        rope = _rope_fields(values.pop("rope_parameters", None))
        names = _STANDARD if release.is_official(values) else {**_STANDARD, "num_key_value_heads": "n_kv_heads"}
        values = {names.get(name, name): value for name, value in values.items()}
        own = {name: values.pop(name) for name in (_FIELDS | _RELEASE) & values.keys()}
        if "n_local_heads" in own and "n_kv_heads" in own:
            own.pop("n_kv_heads")
        fields = ModelConfig.read({"model_type": self.model_type, **own, **rope})
        for name, value in release.keys_of(fields.to_dict()).items():
            if name != "model_type":
                setattr(self, name, value)
        self.skip_logits = skip_logits
        self.use_cache = values.pop("use_cache", True)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, values.pop(name, None))
        # transformers lets a configuration without this key be tied.
        super().__init__(**values, tie_word_embeddings=fields.tie_word_embeddings)

    @property
    def is_causal(self) -> bool:
        """Whether a position sees earlier ones alone, as transformers asks it."""
        return self.causal

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary positions as transformers says them: made of ``rope_base`` and ``rotary_pct``."""
        return {"rope_type": "default", "rope_theta": self.rope_base, "partial_rotary_factor": self.rotary_pct}

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any] | None) -> None:
        for name, own in _rope_fields(value).items():
            setattr(self, name, own)

    def to_model_config(self) -> ModelConfig:
        """The same as the library's own configuration.

        Raises:
            TypeError, ValueError: if a key was given a wrong value.
        """
        values = {name: getattr(self, name) for name in _RELEASE}
        return ModelConfig.from_official({"model_type": self.model_type, **values})

    def to_dict(self) -> dict[str, Any]:
        """All keys; without ``skip_logits``, which says how a model is run and is not saved."""
        values = super().to_dict()
        values.pop("skip_logits", None)
        return values

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: every directory that is saved has the entry for ``trust_remote_code``."""


class MUDDPythiaConfig(MUDDFormerConfig):
    """What a MUDDPythia computes, see :class:`MUDDFormerConfig`."""

    model_type = "muddpythia"

    def __init__(self, **values: Any) -> None:  # without its own, transformers would make one
        super().__init__(**values)


CONFIGS = {config.model_type: config for config in (MUDDFormerConfig, MUDDPythiaConfig)}
"""The classes by ``model_type``."""
