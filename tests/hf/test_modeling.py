"""The classes for transformers: the same numbers as ours, and the tests that transformers has for every model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import muddformer
import muddformer.hf
from helpers.models import VARIANTS, make, scramble, some_ids
from helpers.paths import TESTS

GOLDEN = sorted((TESTS / "golden").glob("*.safetensors"))


def twin(model: muddformer.MUDDFormer, **changes: object) -> PreTrainedModel:
    """The class for transformers with a model's weights."""
    values = model.config.to_dict()
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values, **changes))
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    other.load_state_dict(state)
    return other.train(model.training)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_ours(variant: str) -> None:
    model, ids = scramble(make(variant)).eval(), some_ids()
    with torch.no_grad():
        assert torch.equal(twin(model)(ids).logits, model(ids))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    values = json.loads(metadata["config"])
    config = AutoConfig.for_model(
        metadata["model"], **values, gelu_approximate={"tanh": "tanh"}.get(metadata["gelu"], "none")
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {name[6:]: value for name, value in tensors.items() if name.startswith("param/")}
    model.load_state_dict(state)
    ours = muddformer.build_model(config.to_model_config())
    ours.load_state_dict(state)
    with torch.no_grad():
        logits = model(tensors["input_ids"]).logits
        assert torch.equal(logits, ours(tensors["input_ids"]))
    assert (logits - tensors["logits"]).abs().max() <= 1e-5 * tensors["logits"].abs().max()
    prompt, expected = tensors["prompt"], tensors["greedy_ids"]
    tokens = model.generate(prompt, max_new_tokens=expected.shape[1] - prompt.shape[1], do_sample=False)
    assert torch.equal(tokens, expected)
