"""MUDDFormerConfig: defaults, the public release's keys, and everything that it refuses."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import VARIANTS
from muddformer import MUDDFormerConfig, build_model
from muddformer.models import release

SMALL = {"n_layer": 2, "dim": 32, "n_head": 4, "vocab_size": 61, "intermediate_size": 256, "block_size": 24}


def test_round_trip() -> None:
    config = MUDDFormerConfig(**SMALL, cap=10, ways="vr", window=3, post_norm="all", model_type="muddpythia")
    assert MUDDFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(cap=None).cap is None and config.cap == 10.0 and isinstance(config.cap, float)
    assert hash(config) == hash(config.replace()) and config.plain_twin() == config.replace(dense=False)
    with pytest.raises(AttributeError):
        config.dim = 5


def test_family_defaults() -> None:
    former, pythia = MUDDFormerConfig(), MUDDFormerConfig(model_type="muddpythia")
    assert (former.norm_eps, pythia.norm_eps) == (1e-6, 1e-5)
    assert (former.rotary_pct, pythia.rotary_pct) == (1.0, 0.25)
    assert (former.use_linear_bias, former.use_parallel_residual) == (False, False)
    assert (pythia.use_linear_bias, pythia.use_parallel_residual) == (True, True)
    assert (former.intermediate_size, pythia.intermediate_size) == (6912, 10240)
    assert MUDDFormerConfig(n_head=8).n_kv_heads == 8


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [("MUDDFormer-2.8B", (32, 2560, 32, 6912), 2.8), ("MUDDPythia-1.4B", (24, 2048, 16, 8192), 1.4),
     ("MUDDPythia-2.8B", (32, 2560, 32, 10240), 2.8)],
)  # fmt: skip
def test_presets(name: str, size: tuple[int, ...], parameters: float) -> None:
    config = MUDDFormerConfig.preset(name)
    assert (config.n_layer, config.dim, config.n_head, config.intermediate_size) == size
    assert (config.vocab_size, config.block_size, config.rope_base) == (50432, 2048, 10000.0)
    count = sum(p.numel() for p in build_model(config, device="meta").parameters())
    assert count / 1e9 == pytest.approx(parameters, rel=0.06)
    assert MUDDFormerConfig.preset(name, n_layer=4).n_layer == 4


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"name must be one of MUDDFormer-2\.8B, .* got 'GPT-5'"):
        MUDDFormerConfig.preset("GPT-5")


@given(st.integers(1, 40), st.integers(1, 200).map(lambda n: 64 * n))
@settings(max_examples=100, deadline=None)
def test_ffn_widths(layers: int, width: int) -> None:
    try:
        widths = MUDDFormerConfig(n_layer=layers, intermediate_size=width).ffn_widths
    except ValueError as error:
        assert "intermediate_size is too small for ffn_reallocation" in str(error) and width <= 128
        return
    if layers == 1:
        assert widths == (width,)
        return
    for i, found in enumerate(widths):
        exact = Fraction(width, 128) * (Fraction(i, layers - 1) + Fraction(1, 2))
        assert found % 128 == 0
        # Exact but for ties, where the release's floats decide.
        assert found // 128 == round(exact) or (exact.denominator == 2 and abs(found // 128 - exact) == Fraction(1, 2))
    assert list(widths) == sorted(widths)


def test_widths_of_the_golden_cases() -> None:
    assert MUDDFormerConfig(n_layer=4, intermediate_size=176).ffn_widths == (128, 128, 256, 256)
    assert MUDDFormerConfig(n_layer=4, intermediate_size=256).ffn_widths == (128, 256, 256, 384)
    assert MUDDFormerConfig(n_layer=4, intermediate_size=256, ffn_reallocation=False).ffn_widths == (256,) * 4


def test_official_keys() -> None:
    config = MUDDFormerConfig.from_official(
        {
            "model_type": "muddpythia", "n_layer": 24, "dim": 2048, "n_head": 16, "n_local_heads": -1, "head_dim": 128,
            "intermediate_size": 8192, "vocab_size": 50432, "block_size": 2048, "rope_base": 10000, "norm_eps": 1e-5,
            "use_qk_norm": True, "dense": True, "dynamic_dense": True, "dense_type": "qkvr", "sepln": True,
            "expand_last": True, "round64": True, "stack_hidden": False, "use_layer_cache": True, "is_training": False,
            "rotary_pct": 0.25, "use_parallel_residual": True, "use_linear_bias": True, "window_size": None,
            "architectures": ["MUDDPythia"], "torch_dtype": "float16", "auto_map": {}, "transformers_version": "4.35",
        }
    )  # fmt: skip
    assert config == MUDDFormerConfig.preset("MUDDPythia-1.4B")


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_keys_of_every_variant(variant: str) -> None:
    """What the release has no key for keeps our name."""
    config = MUDDFormerConfig(**SMALL | VARIANTS[variant])
    keys = json.loads(json.dumps(release.keys_of(config.to_dict())))
    assert MUDDFormerConfig.is_official(keys) and MUDDFormerConfig.read(keys) == config


def test_official_defaults_and_families() -> None:
    read = MUDDFormerConfig.from_official
    plain = read({})
    assert plain == MUDDFormerConfig(use_qk_norm=False, expand_last=False, round64=False)
    for key, value in (("rotary_pct", 0.25), ("use_parallel_residual", True), ("use_linear_bias", False)):
        assert read({key: value}).model_type == "muddpythia"
        assert read({key: value}).norm_eps == 1e-5
        assert read({key: value, "model_type": "muddformer"}).model_type == "muddformer"
    assert read({"model": "muddpythia"}).model_type == "muddpythia"
    assert read({"n_local_heads": 8}).n_kv_heads == 8
    assert read({"head_dim": 64}).head_dim == 80  # the release overwrites it
    assert not read({"dense_type": "l"}).multiway and read({"dense_type": "qkvm"}).multiway
    assert not read({"sepln": False}).separate_norms and not read({"dynamic_dense": False}).dynamic
    assert not MUDDFormerConfig.is_official(MUDDFormerConfig().to_dict())
    assert MUDDFormerConfig.is_official({"dense_type": "qkvr"})


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"n_layers": 4}, ValueError, "unknown key 'n_layers': not a field of the public release"),
        ({"multiway": True}, ValueError, "unknown key 'multiway'"),
        ({"dense_type": "qk"}, ValueError, "dense_type must be 'qkvr', 'qkvm' or 'l', got 'qk'"),
        ({"window_size": 256}, ValueError, "window_size must be None"),
        ({"window_type": "LG"}, ValueError, "window_type must be None"),
        ({"n_local_heads": -2}, ValueError, "n_kv_heads must be from 1"),
        ({"sepln": 1}, TypeError, "separate_norms must be True or False, got 1"),
        ({"dynamic_dense": None}, TypeError, "dynamic must be True or False, got None"),
        ({"model_type": "gpt2"}, ValueError, "model_type must be one of .* got 'gpt2'"),
        ([1], TypeError, "the configuration must be a mapping of names to values, got list"),
    ],
)
def test_bad_official(values, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MUDDFormerConfig.from_official(values)


SIZES = ["vocab_size", "block_size", "n_layer", "n_head", "n_kv_heads", "dim", "intermediate_size", "source_stride",
         "block_stride", "window", "flush_interval"]  # fmt: skip
FLAGS = ["use_qk_norm", "use_parallel_residual", "use_linear_bias", "tie_word_embeddings", "ffn_reallocation", "dense",
         "dynamic", "multiway", "separate_norms", "pre_norm", "expand_last", "round64"]  # fmt: skip
REALS = ["norm_eps", "rope_base", "rotary_pct", "initializer_range", "cap"]
WORDS = ["model_type", "post_norm", "gelu_approximate", "ways"]
BAD_FIELDS = [
    *((name, value, ValueError) for name in SIZES for value in (0, -1, 2**40)),
    *((name, value, TypeError) for name in SIZES for value in (True, 2.0, "2", [2])),
    *((name, value, TypeError) for name in FLAGS for value in (0, 1, "true", [])),
    *((name, value, ValueError) for name in REALS for value in (0.0, -1.0, math.nan, math.inf, -math.inf)),
    *((name, value, TypeError) for name in REALS for value in (True, "1e-6", [1.0], 1j)),
    *((name, value, ValueError) for name in WORDS for value in ("", "x", "QKVR", "qkvrq", "none ")),
    *((name, value, TypeError) for name in WORDS for value in (1, True, ["none"], b"tanh")),
    *((name, value, ValueError) for name, value in (("norm_eps", 2.0), ("rotary_pct", 1.5))),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_FIELDS, ids=lambda value: repr(value)[:20])
def test_bad_fields(name: str, value, error: type[Exception]) -> None:
    for make in (lambda v: MUDDFormerConfig(**v), MUDDFormerConfig.from_dict):
        with pytest.raises(error, match=f"^{name} must be ") as caught:
            make({**SMALL, name: value})
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"n_head": 5}, "dim must be a multiple of n_head, got dim=32 and n_head=5"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_head, got n_kv_heads=3 and n_head=4"),
        ({"n_head": 32}, "rotary_pct must select an even number"),
        ({"rotary_pct": 0.1}, "rotary_pct must select an even number .* got 0.1 of dim // n_head = 8, which are 0"),
        ({"rotary_pct": 0.4}, "rotary_pct .* which are 3"),
        ({"intermediate_size": 100}, "intermediate_size is too small for ffn_reallocation"),
        ({"multiway": False, "ways": "qr"}, "ways must be 'qkvr' with multiway=False"),
        ({"window": 2, "flush_interval": 2}, "flush_interval must be None or 1 with a window"),
        ({"widow": 3}, "unknown key 'widow': not a field of MUDDFormerConfig"),
        ({f"key{i}": 0 for i in range(100)}, "unknown key 'key0', 'key1', 'key2', 'key3', 'key4':"),
    ],
)
def test_bad_combinations(fields: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MUDDFormerConfig.from_dict({**SMALL, **fields})


@given(
    st.dictionaries(
        st.sampled_from(SIZES + FLAGS + REALS + WORDS) | st.text(max_size=8),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_json_makes_a_valid_config_or_a_clear_error(values: dict) -> None:
    for read in (MUDDFormerConfig.from_dict, MUDDFormerConfig.from_official):
        try:
            config = read({**SMALL, **values} if read is MUDDFormerConfig.from_dict else values)
        except (TypeError, ValueError) as error:
            assert "must" in str(error) or "unknown key" in str(error) or "too small" in str(error)
        else:
            assert MUDDFormerConfig.from_dict(config.to_dict()) == config
