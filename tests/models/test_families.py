"""Families of models: defaults of the parts, and what is found by model_type."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import muddformer
from muddformer import MUDDFormer, MUDDFormerConfig, build_model
from muddformer.models import FAMILIES, Family, KVCache, Pretrained, load_config
from muddformer.models.config import FAMILY_DEFAULTS
from muddformer.nn import RMSNorm

SMALL = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "dim": 32, "intermediate_size": 256}


def test_all_families_have_the_same_defaults() -> None:
    left_out = {field.name for field in dataclasses.fields(MUDDFormerConfig) if field.default is None}
    for family, defaults in FAMILY_DEFAULTS.items():
        assert defaults.keys() == FAMILY_DEFAULTS["muddformer"].keys(), family
        assert defaults.keys() <= left_out, family
        assert None not in defaults.values(), family


def test_a_family_is_the_defaults_of_its_parts() -> None:
    rms, layer = (MUDDFormerConfig(model_type=name, **SMALL) for name in ("muddformer", "muddpythia"))
    assert (rms.norm, rms.feed_forward, rms.causal) == ("rms", "swiglu", True)
    assert (layer.norm, layer.feed_forward, layer.use_linear_bias) == ("layer", "gelu", True)
    parts = {name: getattr(layer, name) for name in ("norm", "feed_forward", "norm_eps", "rotary_pct")}
    parts |= {"use_parallel_residual": True, "use_linear_bias": True}
    torch.manual_seed(0)
    one = build_model(layer)
    torch.manual_seed(0)
    two = build_model(MUDDFormerConfig(model_type="muddformer", **SMALL, **parts))
    ids = torch.arange(12)[None]
    assert torch.equal(one(ids), two(ids))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu"])
def test_parts_are_chosen_one_by_one(norm: str, feed_forward: str) -> None:
    model = build_model(MUDDFormerConfig(**SMALL, norm=norm, feed_forward=feed_forward))
    assert type(model.norm) is {"rms": RMSNorm, "layer": nn.LayerNorm}[norm]
    assert (model.layers[0].feed_forward.w3 is None) == (feed_forward == "gelu")
    assert model(torch.arange(5)[None]).isfinite().all()


def test_attention_to_later_positions() -> None:
    model = build_model(MUDDFormerConfig(**SMALL, causal=False))
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, -1] = 9
    assert not torch.allclose(model(ids)[0, 0], model(changed)[0, 0])
    with pytest.raises(ValueError, match=r"config must have causal=True.* got False"):
        KVCache(model.config, 1, 8)
    with pytest.raises(ValueError, match="causal=True"):
        muddformer.generate(model, ids, max_new_tokens=2)


def test_device_and_dtype() -> None:
    model = build_model(MUDDFormerConfig(**SMALL), device="meta", dtype=torch.bfloat16)
    assert model.device == torch.device("meta") and model.dtype == torch.bfloat16


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TinyConfig(MUDDFormerConfig):
        """Configurations of the family tiny."""

    class Tiny(MUDDFormer):
        """Models of the family tiny."""

        config_class = TinyConfig

    # model_type names the defaults of MUDDFormerConfig and the classes in FAMILIES
    monkeypatch.setitem(FAMILIES, "tiny", Family(TinyConfig, Tiny))
    monkeypatch.setitem(FAMILY_DEFAULTS, "tiny", {**FAMILY_DEFAULTS["muddpythia"], "norm": "rms"})
    config = TinyConfig(model_type="tiny", **SMALL)
    model = build_model(config)
    assert type(model) is Tiny and config.norm == "rms" and config.feed_forward == "gelu"
    model.save_pretrained(tmp_path)
    loaded = muddformer.from_pretrained(tmp_path)
    assert type(loaded) is Tiny and type(loaded.config) is TinyConfig and load_config(tmp_path) == config
    assert torch.equal(loaded(torch.arange(4)[None]), model(torch.arange(4)[None]))
    assert muddformer.generate(loaded, torch.arange(4)[None], max_new_tokens=3).shape == (1, 7)
    assert isinstance(loaded, Pretrained)


def test_unknown_families(tmp_path: Path) -> None:
    message = f"model_type must be one of {tuple(FAMILY_DEFAULTS)}, got 'gpt'"
    with pytest.raises(ValueError, match=re.escape(message)):
        MUDDFormerConfig(model_type="gpt")
    build_model(MUDDFormerConfig(**SMALL)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("gpt", 3, None, ["muddformer"]):
        (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": name}))
        with pytest.raises(ValueError, match=r"config.json: model_type must be "):
            muddformer.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="config must be a MUDDFormerConfig, got dict"):
        build_model({"model_type": "muddformer"})


def test_files_from_before_the_parts_had_names(tmp_path: Path) -> None:
    model = build_model(MUDDFormerConfig(model_type="muddpythia", **SMALL))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert list(values)[:4] == ["model_type", "norm", "feed_forward", "causal"]
    for name in ("norm", "feed_forward", "causal", "residual_dtype"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert muddformer.from_pretrained(tmp_path).config == model.config


def test_wrappers_name_the_model_inside(tmp_path: Path) -> None:
    model = build_model(MUDDFormerConfig(**SMALL))
    ids = torch.arange(4)[None]
    averaged, compiled = torch.optim.swa_utils.AveragedModel(model), torch.compile(model, backend="eager")
    for wrapped, name in ((averaged, "module"), (nn.DataParallel(model), "module"), (compiled, "_orig_mod")):
        with pytest.raises(
            TypeError, match=rf"model must be a MUDDFormer, got \w+: pass the model inside, model.{name}"
        ):
            muddformer.save_pretrained(wrapped, tmp_path)
    with pytest.raises(TypeError, match=r"got AveragedModel: pass the model inside, model.module"):
        muddformer.generate(averaged, ids, max_new_tokens=2)
    assert muddformer.generate(compiled, ids, max_new_tokens=2).shape == (1, 6)
    with pytest.raises(TypeError, match=r"model must be a MUDDFormer, got Linear$"):
        muddformer.save_pretrained(nn.Linear(2, 2), tmp_path)


def test_names_of_a_hub_are_no_directories() -> None:
    with pytest.raises(FileNotFoundError, match=r"nor its directory. Nothing is fetched here: download a model first"):
        muddformer.from_pretrained("somebody/some-model")
