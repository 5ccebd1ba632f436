"""MUDD connections given to models of transformers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from helpers.paths import PACKAGE
from muddformer import MUDDFormerConfig, build_model
from muddformer.hf import attach, load_attached
from muddformer.nn import ConnectionOptions
from muddformer.nn.norm import as_stream_norms
from muddformer.nn.stack import MUDDStack

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Llama": {**GROUPED, "tie_word_embeddings": True},
    "Mistral": {**GROUPED, "sliding_window": 6},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "GPTNeoX": {},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
two_families = pytest.mark.parametrize("family", ["Qwen3", "GPTNeoX"])  # separate projections, and a fused one


def make(family: str, **sizes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


def stir(model: PreTrainedModel) -> PreTrainedModel:
    """Connections as if they had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.base_model.connections.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def attached(family: str, **fields: object) -> PreTrainedModel:
    return stir(attach(make(family), **fields))


def tokens(batch: int = 2, length: int = 10) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, ids: Tensor, call: nn.Module | None = None) -> dict[str, Tensor]:
    """The gradients of a training step, and its loss."""
    model.train().zero_grad()
    loss = (model if call is None else call)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    names = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **names}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


ENVIRONMENT = {**os.environ, "PYTHONPATH": PACKAGE}
EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {}) for family in FAMILIES),
        *(
            (family, fields)
            for family in ("Qwen3", "GPTNeoX")
            for fields in (
                {"multiway": False},
                {"block_stride": 2, "ways": "qr"},
                {"pre_norm": True, "post_norm": "residual"},
            )
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_fresh_connections_change_no_bit(family: str, fields: dict[str, object]) -> None:
    model, ids = make(family), tokens()
    before = model(ids, output_hidden_states=True)
    names = dict(model.named_parameters())
    assert attach(model, **fields) is model
    after = model(ids, output_hidden_states=True)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(x, y) for x, y in zip(after.hidden_states, before.hidden_states, strict=True))
    kept = dict(model.named_parameters())
    assert all(kept[name] is parameter for name, parameter in names.items())
    prefix = f"{model.base_model_prefix}.connections."
    assert all(name.startswith(prefix) for name in kept.keys() - names.keys())


@two_families
@torch.no_grad()
def test_masks_positions_and_recorded_attention(family: str) -> None:
    model = make(family, attn_implementation="eager")
    ids, mask = tokens(), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "position_ids": mask.cumsum(-1).clamp(min=1) - 1, "output_attentions": True}
    before = model(ids, **given)
    after = attach(model)(ids, **given)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(x, y) for x, y in zip(after.attentions, before.attentions, strict=True))
    assert torch.equal(model.base_model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state,
                       model.base_model(ids).last_hidden_state)  # fmt: skip


def ours(model: PreTrainedModel) -> nn.Module:
    """Our own model with the weights of an attached Qwen3 or GPT-NeoX."""
    pythia, base = model.config.model_type == "gpt_neox", model.base_model
    fields = {"n_kv_heads": None if pythia else GROUPED["num_key_value_heads"], "use_qk_norm": not pythia}
    own = build_model(
        MUDDFormerConfig(
            model_type="muddpythia" if pythia else "muddformer",
            vocab_size=SIZES["vocab_size"],
            block_size=SIZES["max_position_embeddings"],
            n_layer=SIZES["num_hidden_layers"],
            n_head=SIZES["num_attention_heads"],
            dim=SIZES["hidden_size"],
            intermediate_size=SIZES["intermediate_size"],
            ffn_reallocation=False,
            separate_norms=False,
            **fields,
        )
    )
    weights = {"tok_embeddings.weight": model.get_input_embeddings().weight}
    weights["output.weight"] = model.get_output_embeddings().weight

    def put(name: str, module: nn.Module) -> None:
        weights.update({f"{name}.{key}": value for key, value in module.state_dict().items()})

    put("norm", base.final_layer_norm if pythia else base.norm)
    for name, value in base.connections.state_dict().items():
        weights[name] = value
    for i, layer in enumerate(base.layers):
        put(f"layers.{i}.attention_norm", layer.input_layernorm)
        put(f"layers.{i}.ffn_norm", layer.post_attention_layernorm)
        if pythia:
            for name, value in layer.attention.query_key_value.state_dict().items():
                parts = value.unflatten(0, (SIZES["num_attention_heads"], 3, -1)).unbind(1)
                for way, part in zip("qkv", parts, strict=True):
                    weights[f"layers.{i}.attention.w{way}.{name}"] = part.flatten(0, 1)
            put(f"layers.{i}.attention.wo", layer.attention.dense)
            put(f"layers.{i}.feed_forward.w1", layer.mlp.dense_h_to_4h)
            put(f"layers.{i}.feed_forward.w2", layer.mlp.dense_4h_to_h)
        else:
            for way in "qkvo":
                put(f"layers.{i}.attention.w{way}", getattr(layer.self_attn, f"{way}_proj"))
            put(f"layers.{i}.attention.q_norm", layer.self_attn.q_norm)
            put(f"layers.{i}.attention.k_norm", layer.self_attn.k_norm)
            for name, part in (("w1", layer.mlp.gate_proj), ("w2", layer.mlp.down_proj), ("w3", layer.mlp.up_proj)):
                put(f"layers.{i}.feed_forward.{name}", part)
    own.load_state_dict(weights)
    return own.eval()


@two_families
@torch.no_grad()
def test_it_is_the_muddformer_of_these_weights(family: str) -> None:
    model, ids = attached(family), tokens()
    logits = ours(model)(ids)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert (logits - make(family)(ids).logits).abs().max() > 0.1


@every_family
def test_training_moves_every_weight(family: str) -> None:
    model = attach(make(family)).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [gradients_step(model, optimizer, tokens()) for _ in range(4)]
    assert losses[-1] < losses[0]
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not same


def gradients_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    loss = gradients(model, ids)["loss"].item()
    optimizer.step()
    return loss


@two_families
def test_checkpointed_layers_have_the_same_gradients(family: str) -> None:
    model, ids = attached(family), tokens()
    expected = gradients(model, ids)
    wrapped = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, ids), expected, **EXACT)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients(model, ids)
    layers = wrapped.base_model.layers  # as FSDP does it
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    found = gradients(wrapped, ids)
    assert_same({name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()}, expected)


def test_gradients_may_be_deferred() -> None:
    ids = tokens()
    expected = gradients(attached("Qwen3", flush_interval=1), ids)
    assert_same(gradients(attached("Qwen3", flush_interval=3), ids), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.compile
def test_compiled() -> None:
    model, ids = attached("Qwen3"), tokens()
    expected = gradients(model, ids)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, ids, whole), expected, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model.base_model.layers:
        layer.compile(backend=counter, fullgraph=True)
    assert_same(gradients(model, ids), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2  # the first layer's streams are one tensor
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "cache"), [*((family, "dynamic") for family in FAMILIES), ("Qwen3", "static"), ("GPTNeoX", "static")]
)
@torch.no_grad()
def test_generation_is_that_of_whole_forwards(family: str, cache: str) -> None:
    model, ids = attached(family), tokens(length=5)
    made = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    whole = ids
    for _ in range(6):
        whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, whole)


@torch.no_grad()
def test_generation_of_padded_prompts_and_beams() -> None:
    model, ids = attached("Qwen3"), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    alone, batch = (
        model.generate(x, attention_mask=(x != 0).long(), max_new_tokens=4, num_beams=2, do_sample=False)[:, -4:]
        for x in (ids, padded)
    )
    assert torch.equal(alone, batch)


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


@pytest.mark.parametrize(
    ("family", "targets"), [("Qwen3", ["q_proj", "v_proj"]), ("GPTNeoX", ["query_key_value"])], ids=lambda x: str(x)
)
def test_adapters(family: str, targets: list[str], tmp_path) -> None:
    model, ids = attached(family), tokens()
    expected = model(ids).logits
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["connections"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    assert torch.allclose(adapted(ids).logits, expected, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        found = gradients(adapted, ids)
        assert all(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name)
        assert any("connections" in name and value.abs().max() > 0 for name, value in found.items())
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    assert torch.equal(again(ids).logits, adapted(ids).logits)
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_each_projection_adapts_its_own_stream() -> None:
    """An adapter of the keys gets the keys' stream: the same as its product merged into the weight."""
    model, ids = attached("Llama"), tokens()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, found, rtol=1e-3, atol=1e-3)


def test_trainer(tmp_path) -> None:
    model = attach(make("Qwen3"))
    before = model.base_model.connections.dense_bs[0].clone()
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, gradient_checkpointing=True,
        save_steps=1, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(model.base_model.connections.dense_bs[0], before)
    loaded = load_attached(tmp_path / "checkpoint-2").eval()
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


@two_families
def test_bfloat16_and_autocast(family: str) -> None:
    model, ids = make(family), tokens()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(attach(copy.deepcopy(half))(ids).logits, half(ids).logits)
    fresh = attach(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        close = (fresh(ids).logits - model(ids).logits).abs().max() / model(ids).logits.abs().max()
        assert close < 0.05
        found = gradients(attached(family), ids)
    assert all(value.isfinite().all() for value in found.values())


@every_family
def test_norms_are_those_that_operators_make(family: str) -> None:
    model = attach(make(family)).base_model
    x = torch.randn(2, 3, SIZES["hidden_size"])
    norm = model.layers[1].input_layernorm
    kinds = as_stream_norms(model.layers[1].stream_norms, x)
    assert kinds is not None and all(weight is norm.weight for weight in kinds.weights[:3])
    made = nn.functional.rms_norm if kinds.kind == "rms" else nn.functional.layer_norm
    parts = (norm.weight, *([kinds.biases[0]] if kinds.kind == "layer" else []))
    torch.testing.assert_close(made(x, x.shape[-1:], *parts, eps=kinds.eps), norm(x))


@pytest.mark.cuda
@two_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(family: str, dtype: torch.dtype) -> None:
    """The kernels, with the norms and the deferred gradients, against the composition of plain operators on a CPU."""
    model, ids = attached(family), tokens()
    expected = gradients(model, ids)
    found = gradients(copy.deepcopy(model).to("cuda", dtype), ids.cuda())
    for name, value in expected.items():
        error = (found[name].cpu().float() - value).norm() / value.norm().clamp(min=1e-3)
        assert error < (1e-3 if dtype == torch.float32 else 0.1), name


@pytest.mark.cuda
@pytest.mark.parametrize("cache", ["dynamic", "static"])  # the static one compiles the decoding step
@torch.no_grad()
def test_cuda_generation(cache: str) -> None:
    model, ids = attached("Qwen3"), tokens(length=5)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    made = copy.deepcopy(model).cuda().generate(ids.cuda(), **options)
    assert torch.equal(made.cpu(), model.generate(ids, **options))


@pytest.mark.parametrize(
    ("name", "sizes", "missing"),
    [
        ("GPT2", {}, r"GPT2LMHeadModel \(model_type 'gpt2'\) has no layers"),
        ("OPT", {"word_embed_proj_dim": 32}, r"OPTForCausalLM \(model_type 'opt'\) has no layers"),
        ("Phi3", GROUPED, r"Phi3ForCausalLM .* has no q_proj in self_attn, no k_proj in self_attn, no v_proj"),
        ("Gemma2", {**GROUPED, "head_dim": 8}, r"Gemma2ForCausalLM .* what its layers do with them is not known"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.isalnum() else "",
)
def test_other_architectures_are_refused(name: str, sizes: dict[str, object], missing: str) -> None:
    model = make(name, **sizes)
    with pytest.raises(ValueError, match=rf"attach\(\) knows llama, mistral, qwen2, qwen3, gpt_neox; {missing}"):
        attach(model)
    assert not hasattr(model.config, "muddformer")


def test_what_is_refused() -> None:
    model = make("Llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match=r"model must be a PreTrainedModel of transformers.* got Linear"):
        attach(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="without wrappers, got PeftModel"):
        attach(peft.get_peft_model(make("Llama"), peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(TypeError, match="unknown option 'multi'"):
        attach(model, multi=True)
    with pytest.raises(ValueError, match="post_norm must be 'residual' or 'all' with pre_norm=True"):
        attach(model, pre_norm=True)
    with pytest.raises(ValueError, match=r"cap must be more than 1, got 0\.5"):
        attach(model, cap=0.5)
    model.base_model.layers[1].self_attn.forward = lambda *args: args
    with pytest.raises(ValueError, match="a LlamaAttention in it is wrapped or compiled"):
        attach(model)
    del model.base_model.layers[1].self_attn.forward
    compiled = make("Llama")
    compiled.base_model.layers[0] = torch.compile(compiled.base_model.layers[0])
    with pytest.raises(ValueError, match="a OptimizedModule in it is wrapped or compiled"):
        attach(compiled)
    spread = make("Llama")
    spread.base_model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"model must be on one device, .* got cpu, meta"):
        attach(spread)
    assert before == {name: type(module) for name, module in model.named_modules()}
    attach(model)
    with pytest.raises(ValueError, match="no connections yet, but LlamaForCausalLM was attached to before"):
        attach(model, multiway=False)


def test_options_as_a_whole_and_a_base_model() -> None:
    base = attach(make("Qwen2").base_model, ConnectionOptions(dynamic=False), window=2)
    connections = base.connections
    assert not isinstance(connections, MUDDStack)
    assert (connections.options.multiway, connections.options.dynamic, connections.options.window) == (False, False, 2)
    assert base(tokens()).last_hidden_state.shape == (2, 10, SIZES["hidden_size"])


def test_other_heads() -> None:
    config = transformers.LlamaConfig(**SIZES, **GROUPED, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    before = model(tokens()).logits
    assert torch.equal(attach(model)(tokens()).logits, before)


def test_without_transformers() -> None:
    lines = "import sys; sys.modules['transformers'] = None; import muddformer.hf"
    done = subprocess.run([sys.executable, "-c", lines], env=ENVIRONMENT, capture_output=True, text=True)
    assert "transformers is needed here and cannot be imported" in done.stderr
    assert 'pip install "muddformer[hf]"' in done.stderr
