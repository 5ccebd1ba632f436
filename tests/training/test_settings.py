"""Settings from presets, files and overrides."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("yaml")

from muddformer.errors import InputError
from muddformer.training import modelling
from muddformer.training.settings import DataSettings, Settings, TrainSettings, load_file, load_preset, preset_names


def test_presets_are_valid():
    assert "demo" in preset_names()
    for name in preset_names():
        preset = load_preset(name)
        assert Settings.from_dict(preset.to_dict()) == preset
        with torch.device("meta"):
            modelling.make_model(preset.model, preset.data.vocab_size)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", ".1e-2"])
def test_numbers_of_yaml(text):
    assert Settings().override([f"train.learning_rate={text}"]).train.learning_rate == 1e-3


def test_files_presets_and_overrides_are_layers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {dim: 64}\ntrain:\n  steps: 7\n  seed: 3\n")
    settings = load_file(path, over=load_preset("demo")).override(["train.seed=4", "data.paths=[a, b]"])
    assert settings.model["dim"] == 64 and settings.model["n_layer"] == load_preset("demo").model["n_layer"]
    assert (settings.train.steps, settings.train.seed, settings.data.paths) == (7, 4, ("a", "b"))
    assert load_file(path).train.batch_size == TrainSettings().batch_size


def test_sections_that_are_made_directly_are_checked():
    assert DataSettings(paths="text").paths == ("text",)
    assert Settings().override(["train.threads=none", "data.cache_dir=none"]).data.cache_dir is None
    with pytest.raises(InputError, match=r"train\.steps must be at least 1, got -5"):
        TrainSettings(steps=-5)
    with pytest.raises(InputError, match=r"data\.val_fraction must be less than 1"):
        DataSettings(val_fraction=5)
    with pytest.raises(InputError, match=r"train\.learning_rate must be finite"):
        TrainSettings(learning_rate=10**400)
    with pytest.raises(InputError, match=r"settings must be a list of SECTION\.KEY=VALUE, got one text"):
        Settings().override("train.steps=5")
    with pytest.raises(InputError, match="section 'train' must map keys to values, got list"):
        Settings().merge({"train": [1]})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\npaths = ["x"]\n[train]\nsteps = 7\nlearning_rate = 1e-3\n')
    settings = load_file(path)
    assert (settings.train.steps, settings.train.learning_rate, settings.data.paths) == (7, 1e-3, ("x",))
