"""The configuration of a model: architecture, connections and nothing about training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._checks import check_choice, check_flag, check_integer, check_keys, check_real
from ..nn import ConnectionOptions
from . import release

__all__ = ["FAMILY_DEFAULTS", "MUDDFormerConfig"]

# What a family stands for: the values of the fields that are left out. All lines have the same fields, those whose
# default in MUDDFormerConfig is None for it.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "muddformer": {
        "norm": "rms",
        "feed_forward": "swiglu",
        "norm_eps": 1e-6,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "use_linear_bias": False,
    },
    "muddpythia": {
        "norm": "layer",
        "feed_forward": "gelu",
        "norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "use_linear_bias": True,
    },
}
_CHOICES = {"norm": ("rms", "layer"), "feed_forward": ("swiglu", "gelu")}
_FLAGS = (
    "causal",
    "use_qk_norm",
    "use_parallel_residual",
    "use_linear_bias",
    "tie_word_embeddings",
    "ffn_reallocation",
    "separate_norms",
)
# Largest value of each size. Far above any model, low enough that a broken file cannot ask for an endless build.
_SIZES = {
    "vocab_size": 2**31 - 1,
    "block_size": 2**22,
    "n_layer": 1024,
    "n_head": 2**16,
    "n_kv_heads": 2**16,
    "dim": 2**20,
    "intermediate_size": 2**24,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MUDDFormerConfig(ConnectionOptions):
    """What a model computes (arXiv 2502.12170). Immutable; every field is checked when it is made.

    The fields of :class:`muddformer.nn.ConnectionOptions` (``dense`` to ``residual_dtype``) say how hidden states are
    mixed; ``multiway`` is True here unless it is given. The others:

    Args:
        model_type: the family, a key of ``muddformer.models.config.FAMILY_DEFAULTS``, which has the values that stand
            for None below where it says so.
        norm: ``"rms"`` (RMSNorm) or ``"layer"`` (LayerNorm) over the model width. None: the family's.
        feed_forward: ``"swiglu"`` or ``"gelu"``. None: the family's.
        causal: a position sees itself and earlier ones; False: all of them, which leaves no room for generation.
        vocab_size: number of tokens.
        block_size: longest sequence.
        n_layer: number of blocks L.
        n_head: number of query heads; the head width is ``dim // n_head``.
        n_kv_heads: number of key and value heads, a divisor of ``n_head``. None: ``n_head``.
        dim: model width D.
        intermediate_size: FFN hidden width before re-allocation. None: 8/3 D up to a multiple of 256
            for SwiGLU, 4 D for GELU.
        ffn_reallocation: FFN width grows with depth from half of ``intermediate_size`` to 1.5 times (Eq. 9).
        norm_eps: added to the variance in every norm. None: the family's.
        rope_base: base of the rotary frequencies.
        rotary_pct: rotated part of each head. None: the family's.
        use_qk_norm: RMSNorm of every query and key head before the rotation.
        use_parallel_residual: attention and FFN read the same residual stream. None: the family's.
        use_linear_bias: biases in attention and FFN. None: the family's.
        tie_word_embeddings: the head shares the weight of the embedding.
        initializer_range: standard deviation of fresh weight matrices and embeddings.
        separate_norms: q, k and v have a norm each (blocks that receive distinct streams only).

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    model_type: str = "muddformer"
    norm: str | None = None
    feed_forward: str | None = None
    causal: bool = True
    vocab_size: int = 50432
    block_size: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_heads: int | None = None
    dim: int = 2560
    intermediate_size: int | None = None
    ffn_reallocation: bool = True
    norm_eps: float | None = None
    rope_base: float = 10000.0
    rotary_pct: float | None = None
    use_qk_norm: bool = True
    use_parallel_residual: bool | None = None
    use_linear_bias: bool | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    separate_norms: bool = True
    multiway: bool = True

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, tuple(FAMILY_DEFAULTS))
        for name, default in FAMILY_DEFAULTS[self.model_type].items():
            if getattr(self, name) is None:
                self._set(name, default)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        for name, limit in _SIZES.items():
            if getattr(self, name) is None:
                self._set(name, self._default_size(name))
            self._set(name, check_integer(name, getattr(self, name), limit))
        self._set("norm_eps", check_real("norm_eps", self.norm_eps, 0.0, 1.0))
        self._set("rope_base", check_real("rope_base", self.rope_base))
        self._set("rotary_pct", check_real("rotary_pct", self.rotary_pct, 0.0, 1.0))
        self._set("initializer_range", check_real("initializer_range", self.initializer_range))
        super().__post_init__()
        self._check_combinations()

    def _default_size(self, name: str) -> int | None:
        # n_head and dim stand before the fields that depend on them in _SIZES, so they are known to be right here.
        if name == "n_kv_heads":
            return self.n_head
        if name == "intermediate_size":
            return 4 * self.dim if self.feed_forward == "gelu" else -(int(8 * self.dim / 3) // -256) * 256
        return None

    def _check_combinations(self) -> None:
        if self.dim % self.n_head:
            raise ValueError(f"dim must be a multiple of n_head, got dim={self.dim} and n_head={self.n_head}")
        if self.n_head % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_head, got n_kv_heads={self.n_kv_heads} and n_head={self.n_head}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct must select an even number of at least 2 entries of a head: got {self.rotary_pct} of "
                f"dim // n_head = {self.head_dim}, which are {self.rotary_dim}"
            )
        if self.block_size * self.rotary_dim > 2**30:
            raise ValueError(
                f"block_size is too large for the tables of rotary positions: got {self.block_size} positions of "
                f"{self.rotary_dim} entries, more than 2**30 numbers"
            )
        if self.ffn_reallocation and min(self.ffn_widths) < 1:
            raise ValueError(
                f"intermediate_size is too small for ffn_reallocation, which rounds widths to multiples of 128: "
                f"got {self.intermediate_size}, which leaves a block with a width of 0 (more than 128, or "
                f"ffn_reallocation=False)"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_head

    @property
    def rotary_dim(self) -> int:
        """Number of rotated entries of each head."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """Hidden width of the FFN of every block (Eq. 9: linear from 0.5 to 1.5 of ``intermediate_size``)."""
        if not self.ffn_reallocation or self.n_layer == 1:
            return (self.intermediate_size,) * self.n_layer
        last = self.n_layer - 1
        # In the release's order of operations, rounding half to even: at a tie the last bit decides a width.
        return tuple(round(self.intermediate_size * (i / last + 0.5) / 128) * 128 for i in range(self.n_layer))

    def replace(self, **changes: Any) -> MUDDFormerConfig:
        """A checked copy with some fields changed. Another ``model_type`` changes no field that has a value already."""
        return self.from_dict({**self.to_dict(), **changes})

    def plain_twin(self) -> MUDDFormerConfig:
        """The same Transformer without connections: equal blocks and widths, ``dense=False``."""
        return self.replace(dense=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, ready for JSON; :meth:`from_dict` takes them back."""
        values = dataclasses.asdict(self)
        connections = {field.name: values.pop(field.name) for field in dataclasses.fields(ConnectionOptions)}
        return {**values, **connections}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MUDDFormerConfig:
        """A configuration from field names and values; fields left out take their defaults.

        Raises:
            TypeError, ValueError: for an unknown field or a wrong value.
        """
        check_keys(values, {field.name for field in dataclasses.fields(cls)}, "MUDDFormerConfig")
        return cls(**values)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> MUDDFormerConfig:
        """A configuration from our field names (:meth:`from_dict`) or the public release's (:meth:`from_official`).

        Raises:
            TypeError, ValueError: for an unknown key or a wrong value.
        """
        return cls.from_official(values) if cls.is_official(values) else cls.from_dict(values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MUDDFormerConfig:
        """The configuration of a published checkpoint: MUDDFormer-2.8B, MUDDPythia-1.4B or MUDDPythia-2.8B.

        Raises:
            ValueError: for an unknown name, listing the known ones.
        """
        if name not in release.PRESETS:
            raise ValueError(f"name must be one of {', '.join(release.PRESETS)}, got {name!r}")
        return cls(**{**release.PRESETS[name], **changes})

    @classmethod
    def from_official(cls, values: Mapping[str, Any]) -> MUDDFormerConfig:
        """A configuration from the keys of the public release (its ``config.json``).

        Keys left out take the release's defaults; those that only say how the release runs are accepted and dropped.
        The family is ``model_type`` (or ``model``), or else muddpythia if one of rotary_pct, use_parallel_residual and
        use_linear_bias is there. ``dense_type`` is ``"qkvr"`` (older: ``"qkvm"``) or ``"l"``, one aggregate for all
        streams.

        Raises:
            TypeError, ValueError: for an unknown key, or a value that is wrong or not supported here.
        """
        return cls(**release.fields_of(values))

    @staticmethod
    def is_official(values: Mapping[str, Any]) -> bool:
        """Whether a mapping uses the keys of the public release instead of this class's fields."""
        return release.is_official(values)
