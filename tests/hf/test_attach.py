"""MUDD connections given to models of transformers: what the models compute, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from helpers.attached import FAMILIES, GROUPED, SIZES, attached, every_family, gradients, make, tokens, two_families
from helpers.paths import PACKAGE
from muddformer import MUDDFormerConfig, build_model
from muddformer.hf import attach
from muddformer.nn import ConnectionOptions
from muddformer.nn.norm import as_stream_norms
from muddformer.nn.stack import MUDDStack


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
    """The kernels, with the norms and the deferred gradients, are as near to float64 as single steps on a CPU."""
    model, ids = attached(family).to(dtype), tokens()
    expected = gradients(copy.deepcopy(model).double(), ids)
    composed = gradients(copy.deepcopy(model), ids)
    found = gradients(model.to("cuda"), ids.cuda())
    for name, value in expected.items():
        on_cpu, error = (
            float((x[name].cpu() - value).norm() / value.norm().clamp(min=1e-3)) for x in (composed, found)
        )
        assert error < max(1e-3 if dtype == torch.float32 else 0.1, 2 * on_cpu), name


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
    with pytest.raises(ValueError, match=r"model must have one device, .* got cpu, meta"):
        attach(spread)
    assert before == {name: type(module) for name, module in model.named_modules()}
    attach(model)
    with pytest.raises(ValueError, match="no connections yet, but LlamaForCausalLM was attached to before"):
        attach(model, multiway=False)


def test_without_transformers() -> None:
    lines = "import sys; sys.modules['transformers'] = None; import muddformer.hf"
    done = subprocess.run(
        [sys.executable, "-c", lines], env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True
    )
    assert "transformers is needed here and cannot be imported" in done.stderr
    assert 'pip install "muddformer[hf]"' in done.stderr
