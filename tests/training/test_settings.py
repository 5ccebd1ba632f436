"""Settings from presets, files and overrides."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("yaml")

from muddformer.training import modelling
from muddformer.training.settings import Settings, TrainSettings, load_file, load_preset, preset_names


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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\npaths = ["x"]\n[train]\nsteps = 7\nlearning_rate = 1e-3\n')
    settings = load_file(path)
    assert (settings.train.steps, settings.train.learning_rate, settings.data.paths) == (7, 1e-3, ("x",))
