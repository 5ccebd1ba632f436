"""Attached models in training: by hand, checkpointed, compiled, through Trainer, with adapters."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from helpers.attached import EXACT, assert_same, attached, every_family, gradients, make, tokens, two_families
from muddformer.hf import attach, load_attached


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
