"""The optimizer's groups and the learning rate."""

from __future__ import annotations

import math

import pytest

from helpers.runs import MODEL
from muddformer.models import MUDDFormerConfig, build_model
from muddformer.training.optim import learning_rate, make_optimizer, parameter_groups
from muddformer.training.settings import TrainSettings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["muddformer", "muddpythia"])
def test_only_matrices_decay(family, tied):
    config = {**MODEL, "model_type": family, "vocab_size": 32, "tie_word_embeddings": tied, "rotary_pct": 1.0}
    model = build_model(MUDDFormerConfig(**config, pre_norm=True, post_norm="residual"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert sorted(decayed + kept) == sorted(names.values())
    layer = ["wq", "wk", "wv", "wo"] + ["w1", "w2"] + ["w3"] * (family == "muddformer")
    assert {name.split(".")[-2] for name in decayed} == {*layer, *(() if tied else ("output",))}
    assert not any("dense" in name or "norm" in name or "embedding" in name for name in decayed)
    assert {"dense_bs.0", "dynamic_dense.0.w1.weight", "dynamic_dense.0.w2.weight"} <= set(kept)


def test_optimizer_follows_the_settings():
    model = build_model(MUDDFormerConfig(**MODEL, vocab_size=32))
    optimizer = make_optimizer(model, TrainSettings(beta1=0.8, beta2=0.9, weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (4, 10), (10, 10), (20, 10), (1, 1)])
def test_learning_rate(warmup, steps):
    settings = TrainSettings(learning_rate=2.0, min_lr_ratio=0.1, warmup_steps=warmup, steps=steps)
    rates = [learning_rate(step, settings) for step in range(1, steps + 1)]
    for step, rate in enumerate(rates, 1):
        if step <= warmup:
            assert rate == pytest.approx(2.0 * step / warmup)
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            assert rate == pytest.approx(0.2 + 1.8 * (1 + math.cos(angle)) / 2)
    if warmup < steps:
        assert rates[-1] == pytest.approx(0.2)
