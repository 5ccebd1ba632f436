"""The classes for transformers: the same numbers as ours, and the tests that transformers has for every model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import muddformer
from helpers.hf import small, tiny_tokenizer, twin
from helpers.models import VARIANTS, make, scramble, some_ids
from helpers.paths import TESTS
from muddformer import hf
from muddformer.hf.devices import check_device_map

GOLDEN = sorted((TESTS / "golden").glob("*.safetensors"))


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


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("name", ["MUDDFormer-2.8B", "MUDDPythia-1.4B", "MUDDPythia-2.8B"])
def test_released_configurations(name: str) -> None:
    """The released sizes, and the same logits in a model of their depth that is a few heads wide."""
    config = muddformer.MUDDFormerConfig.preset(name, round64=True, expand_last=True)
    values = muddformer.models.release.keys_of(config.to_dict())
    assert AutoConfig.for_model(**values).to_model_config() == config
    narrow = config.replace(dim=2 * config.head_dim, n_head=2, n_kv_heads=2, intermediate_size=256, vocab_size=61)
    ours = scramble(muddformer.build_model(narrow), 0.02).eval()
    with torch.no_grad():
        ids = some_ids(1)
        assert torch.equal(logits(twin(ours), ids), ours(ids))


@pytest.mark.parametrize("variant", ["default", "pythia", "mqa-tied"])
def test_files_go_both_ways(variant: str, tmp_path: Path) -> None:
    model, ids = small(variant), some_ids()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again, ids), expected)
    ours = muddformer.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(ours(ids), expected)
    ours.save_pretrained(tmp_path / "b")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert torch.equal(logits(again, ids), expected) and not info["missing_keys"] and not info["unexpected_keys"]
    # Buffers are made anew after the meta device, and stay float32 in another dtype.
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16 and torch.equal(half.rotary.cos, model.rotary.cos)
    base = AutoModel.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(model.output(base(ids).last_hidden_state), expected)
    assert again.config.tie_word_embeddings == (again.output.weight is again.tok_embeddings.weight)


def test_a_saved_directory_is_ready_to_be_pushed(tmp_path: Path) -> None:
    model = small("pythia")
    model.save_pretrained(tmp_path)
    assert "muddformer" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is hf.MUDDPythia and type(loaded.config) is hf.MUDDPythiaConfig


def test_initial_values() -> None:
    """From meta, as a checkpoint without some parameters leaves it, they are those of a model made on the CPU."""
    config = AutoConfig.for_model(**make("pre-post").config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    fresh = AutoModelForCausalLM.from_config(config)
    for (name, a), (_, b) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        same = torch.equal(a, b) if a.std() == 0 or name.startswith("dense_bs") else abs(a.std() / b.std() - 1) < 0.3
        assert a.isfinite().all() and same, name
    assert torch.equal(model.rotary.cos, fresh.rotary.cos)


def test_parameters_that_a_checkpoint_lacks(tmp_path: Path) -> None:
    model = small()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("dense_bs.1")}
    model.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.dense_bs[0], model.dense_bs[0])
    assert torch.equal(again.dense_bs[1], make().dense_bs[1])


@pytest.mark.parametrize("variant", ["default", "mqa-tied"])
def test_resized_embeddings(variant: str) -> None:
    model, ids = small(variant), some_ids()
    before = logits(model, ids)
    model.resize_token_embeddings(before.shape[-1] + 3)
    after = logits(model, ids)
    assert after.shape[-1] == before.shape[-1] + 3 and torch.equal(after[..., :-3], before)
    assert (model.output.weight is model.tok_embeddings.weight) == (variant == "mqa-tied")


def test_left_padding() -> None:
    model, ids = small(), some_ids(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, ids)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[:, 3:], expected, rtol=1e-3, atol=1e-4)
    # Rotary positions are relative.
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, 3:], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", pytest.param("flex_attention", marks=pytest.mark.compile)])
def test_attention_functions(name: str) -> None:
    model, ids = small("gqa", dim=64), some_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation(name)
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-3, atol=1e-4)


def test_attention_step_by_step_in_float64() -> None:
    """The mask's smallest float64 is no float32: rows of padding would have no weights, and make all values NaN."""
    model, ids = small("gqa", dim=64).double(), some_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-10, atol=1e-10)


def test_outputs() -> None:
    model, ids = small(), some_ids()
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    blocks = model.config.num_hidden_layers
    assert len(out.hidden_states) == blocks + 1 and len(out.attentions) == blocks
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, model.config.num_attention_heads, 7))
    assert torch.equal(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, out.logits[:, [0, 3]])
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    assert torch.equal(model(inputs_embeds=out.hidden_states[0]).logits, out.logits)


def test_standard_names_change_no_defaults() -> None:
    standard = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_reallocation": False}
    ours = hf.MUDDFormerConfig(**standard).to_model_config()
    assert hf.MUDDFormerConfig(**standard, num_key_value_heads=4).to_model_config() == ours
    grouped = hf.MUDDFormerConfig(**standard, num_key_value_heads=2, separate_norms=False).to_model_config()
    assert grouped == ours.replace(n_kv_heads=2, separate_norms=False)
    released = hf.MUDDFormerConfig(**standard, dense_type="qkvr", num_key_value_heads=2).to_model_config()
    assert released.n_kv_heads == 2 and not released.use_qk_norm


def test_rope_parameters() -> None:
    config = hf.MUDDPythiaConfig(n_layer=2, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5})
    assert (config.rope_base, config.rotary_pct) == (500.0, 0.5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"rope_type must be 'default'.* got 'yarn'"):
        hf.MUDDFormerConfig(rope_parameters={"rope_type": "yarn"})


def test_one_device_has_many_names() -> None:
    check_device_map({"a": 0, "b": "cuda:0", "c": torch.device("cuda", 0)})
    check_device_map({"a": "cpu", "b": torch.device("cpu")})
    check_device_map("auto")


def test_bad_directories(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    values = json.loads((tmp_path / "config.json").read_text())

    def config(**changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))

    config(model_type="llama")
    with pytest.raises(ValueError, match="model_type must be 'muddformer' for a MUDDFormerConfig, got 'llama'"):
        hf.MUDDFormer.from_pretrained(tmp_path)
    config(vocab_size=99)
    with pytest.raises(ValueError, match=r"tok_embeddings.weight must have shape \[99, 32\], got \[61, 32\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config()
    with pytest.raises(ValueError, match=r"device_map must have one device, .* got cpu, cuda:0"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "layers.1": 0})
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    torch.save({"tok_embeddings.weight": Path("code")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_bad_calls() -> None:
    model = small()
    with pytest.raises(ValueError, match="at most block_size=24 tokens, got 25"):
        model(some_ids(1, 25))
    with pytest.raises(IndexError, match="input_ids must be from 0 to vocab_size - 1 = 60, got 0 to 99"):
        model(torch.tensor([[0, 99]]))
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, tokens\], got shape \[7\]"):
        model(some_ids(1, 7)[0])
    for rope in ({"rope_theta": 0}, {"rope_theta": "x"}, {"partial_rotary_factor": 0}):
        with pytest.raises((TypeError, ValueError), match=r"rope_base|rotary_pct"):
            type(model.config)(**{**model.config.to_dict(), "rope_parameters": rope})


def test_a_tokenizer_without_a_pad_token() -> None:
    tokenizer = tiny_tokenizer(pad=False)
    with pytest.raises(ValueError, match="pad"):
        tokenizer(["a b", "a"], padding=True)
