"""Attached models saved, loaded, copied and pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

from helpers.attached import EXACT, assert_same, attached, every_family, gradients, make, tokens, two_families
from muddformer.hf import attach, load_attached
from muddformer.nn import ConnectionOptions


@every_family
def test_saved_and_loaded(family: str, tmp_path) -> None:
    model, ids = attached(family, source_stride=2), tokens()
    model.save_pretrained(tmp_path)
    loaded = load_attached(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.config.muddformer == model.config.muddformer
    assert loaded.base_model.connections.options == ConnectionOptions(multiway=True, source_stride=2)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half, info = load_attached(tmp_path, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True)
    assert not info["missing_keys"] and {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert_same(gradients(loaded, ids), gradients(model, ids), **EXACT)


def test_what_does_not_load(tmp_path) -> None:
    plain = make("Llama")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain has no connections: from_pretrained\(\) reads it"):
        load_attached(tmp_path / "plain")
    model = attach(plain)
    model.save_pretrained(tmp_path / "attached")
    without = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "attached")
    with pytest.raises(ValueError, match=r"saved with connections, which it was loaded without: load_attached\(\)"):
        attach(without)
    without.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"lost lacks \d+ weights of its connections, among them model.connections."):
        load_attached(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"device_map must have one device, .* got cpu, cuda:0"):
        load_attached(tmp_path / "attached", device_map={"": "cpu", "model.layers.1": 0})
    model.config.architectures = ["LlamaForNothing"]
    model.config.save_pretrained(tmp_path / "attached")
    with pytest.raises(ValueError, match="was saved as 'LlamaForNothing', which transformers"):
        load_attached(tmp_path / "attached")


@two_families
def test_copied_and_pickled(family: str) -> None:
    model, ids = attached(family), tokens()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert other.base_model.connections is not model.base_model.connections
