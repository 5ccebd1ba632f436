"""A small text, settings to train on it, and a model that has been trained."""

from __future__ import annotations

import random

import pytest
import torch

from helpers.runs import MODEL, TRAIN
from muddformer.models import MUDDFormerConfig, build_model
from muddformer.training.optim import make_optimizer
from muddformer.training.settings import Settings, TrainSettings


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "texts").mkdir()
    for number in range(4):
        words = random.Random(number).choices(["depth", "way", "stream", "key", "value", "query"], k=600)
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def make_settings(folder):
    data = {"paths": [str(folder / "texts")], "vocab_size": 280, "cache_dir": str(folder / "cache")}

    def make(**train) -> Settings:
        return Settings.from_dict({"model": MODEL, "data": data, "train": {**TRAIN, **train}})

    return make


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = build_model(MUDDFormerConfig(**MODEL, vocab_size=32))
    optimizer = make_optimizer(model, TrainSettings())
    ids = torch.arange(16).reshape(2, 8)
    for _ in range(2):
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer
