"""What people do with any model of transformers, done to ours and to attached ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache, pipeline

import muddformer
from helpers.attached import attached
from helpers.hf import small, tiny_tokenizer
from helpers.models import some_ids
from muddformer.hf import load_attached

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[..., PreTrainedModel]]] = {
    "ours": (lambda: small("gqa"), AutoModelForCausalLM.from_pretrained),
    "pythia": (lambda: small("pythia"), AutoModelForCausalLM.from_pretrained),
    "Qwen3": (lambda: attached("Qwen3"), load_attached),
    "GPTNeoX": (lambda: attached("GPTNeoX"), load_attached),
}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return MODELS[kind][0]()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(1)
    return some_ids(2, 6)


def greedy(model: PreTrainedModel, ids: Tensor | None = None, **options: object) -> Tensor:
    return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)


def left_padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Two tokens of the first prompt replaced, and the mask that says so."""
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :2] = mask[0, :2] = 0
    return padded, mask


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_prompts(model: PreTrainedModel, ids: Tensor, cache: str) -> None:
    padded, mask = left_padded(ids)
    found = greedy(model, padded, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(found[0, 2:], greedy(model, ids[:1, 2:])[0])
    assert torch.equal(found[1:], greedy(model, ids[1:]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_on_either_side(model: PreTrainedModel, ids: Tensor, attention: str) -> None:
    model.set_attn_implementation(attention)
    expected = model(ids).logits
    right = torch.cat([ids, ids.new_zeros(2, 3)], 1)
    found = model(right, attention_mask=(torch.arange(9) < 6).long().expand(2, 9)).logits
    torch.testing.assert_close(found[:, :6], expected, **CLOSE)
    padded, mask = left_padded(ids)
    found = model(padded, attention_mask=mask).logits
    assert found.isfinite().all()  # rows that attend to nothing too
    torch.testing.assert_close(found[0, 2:], model(ids[:1, 2:]).logits[0], **CLOSE)


@torch.no_grad()
def test_generation_from_embeddings(model: PreTrainedModel, ids: Tensor) -> None:
    embedded = model.get_input_embeddings()(ids)
    found = greedy(model, inputs_embeds=embedded, attention_mask=torch.ones_like(ids))
    assert torch.equal(found, greedy(model, ids)[:, 6:])


@pytest.mark.parametrize("kind_of_cache", ["dynamic", "of the configuration", "static"])
@torch.no_grad()
def test_a_cache_by_hand(model: PreTrainedModel, ids: Tensor, kind_of_cache: str) -> None:
    if kind_of_cache == "static":
        cache = StaticCache(config=model.config, max_cache_len=20)
    else:
        cache = DynamicCache(config=model.config) if kind_of_cache != "dynamic" else DynamicCache()
    expected = model(ids).logits
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
    if kind_of_cache != "static":
        cache.crop(-2)
        again = model(ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(again, expected[:, 4:], **CLOSE)


@torch.no_grad()
def test_attention_and_hidden_states_of_generation(model: PreTrainedModel, ids: Tensor) -> None:
    model.set_attn_implementation("eager")
    wanted = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
    found = greedy(model, ids, return_dict_in_generate=True, **wanted)
    blocks, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert [len(step) for step in found.attentions] == [blocks] * 5
    assert [tuple(step[0].shape) for step in found.attentions] == [(2, heads, 6, 6)] + [
        (2, heads, 1, 6 + i) for i in range(1, 5)
    ]
    assert [len(step) for step in found.hidden_states] == [blocks + 1] * 5
    assert torch.equal(torch.stack(found.logits, 1).argmax(-1), found.sequences[:, 6:])
    model.set_attn_implementation("sdpa")  # which has no weights to show
    assert not model(ids, output_attentions=True).attentions


def test_resized_embeddings_saved_and_trained(kind: str, model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    model.resize_token_embeddings(70)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = MODELS[kind][1](tmp_path).eval()
    assert again.config.vocab_size == 70 and expected.shape[-1] == 70
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
        if kind in ("ours", "pythia"):
            torch.testing.assert_close(muddformer.from_pretrained(tmp_path)(ids), expected, **CLOSE)
    again.resize_token_embeddings(30, pad_to_multiple_of=16)
    assert again.config.vocab_size == 32
    again.train()(ids % 30, labels=ids % 30).loss.backward()
    assert again.get_input_embeddings().weight.grad.shape[0] == 32


@pytest.mark.parametrize("device_map", ["auto", "sequential", "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_device_maps(
    kind: str, model: PreTrainedModel, ids: Tensor, device_map: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MODELS[kind][1](tmp_path, device_map=device_map).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_by_name(kind: str, model: PreTrainedModel, ids: Tensor, dtype: str, tmp_path: Path) -> None:
    load, expected = MODELS[kind][1], getattr(torch, dtype)
    model.save_pretrained(tmp_path / "wide")
    loaded = load(tmp_path / "wide", dtype=dtype).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    for cache in ("dynamic", "static"):
        assert greedy(loaded, ids, cache_implementation=cache).shape == (2, 11)
    loaded.save_pretrained(tmp_path / "narrow")
    assert load(tmp_path / "narrow", dtype="auto").dtype == expected
    assert load(tmp_path / "narrow", dtype="float32").dtype == torch.float32
    assert load(tmp_path / "wide", torch_dtype=dtype).dtype == expected  # what it was called before version 5
    cast = model.to(expected)  # as model.half() does; some of transformers' then have coarser rotary positions
    with torch.no_grad():
        torch.testing.assert_close(cast(ids).logits, loaded(ids).logits, rtol=0.05, atol=0.1)


def test_from_config() -> None:
    config = small().config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert AutoConfig.for_model(**config.to_dict()).to_dict() == config.to_dict()


def test_pipeline(kind: str, model: PreTrainedModel, tmp_path: Path) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    write = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    alone = [write(text, **options) for text in ("a b c", "a b")]
    assert write(["a b c", "a b"], batch_size=2, **options) == alone
    if kind in ("ours", "pythia"):
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        assert pipeline("text-generation", model=str(tmp_path), device="cpu")("a b c", **options) == alone[0]


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_labels_that_do_not_count(model: PreTrainedModel, ids: Tensor) -> None:
    labels = ids.clone()
    labels[0, :4] = -100
    count = int((labels[:, 1:] != -100).sum())
    for training in (True, False):
        model.train(training)
        mean = model(ids, labels=labels).loss
        for items in (9, torch.tensor(9)):
            torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=items).loss, mean * count / 9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_adapters_of_every_layer(model: PreTrainedModel, ids: Tensor, reentrant: bool) -> None:
    if reentrant and not isinstance(model, muddformer.hf.MUDDFormer):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            checkpointed(model, ids, True)
        return
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = {name: value.clone() for name, value in gradients(adapted, ids).items()}
    for name, value in checkpointed(adapted, ids, reentrant).items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        logits = adapted.eval()(ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, rtol=1e-3, atol=1e-3)


def checkpointed(model: PreTrainedModel, ids: Tensor, reentrant: bool) -> dict[str, Tensor]:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return gradients(model, ids)
