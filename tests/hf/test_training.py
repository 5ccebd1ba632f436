"""Trainer, adapters and quantisation: what people do with a model of transformers."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig, Trainer, TrainingArguments

import muddformer
from helpers.hf import small
from helpers.models import make, scramble, some_ids


class Rows(Dataset):
    """Sequences of one length with labels that do not all count."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(61, (count, 8), generator=generator)
        self.labels = self.ids.clone()
        self.labels[::3, :5] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def train(model: PreTrainedModel, folder: Path, resume: bool = False, **settings: object) -> Trainer:
    given = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    trainer = Trainer(model=model, args=TrainingArguments(**{**given, **settings}), train_dataset=Rows(16))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def losses(trainer: Trainer) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def close(a: PreTrainedModel, b: PreTrainedModel, atol: float = 1e-5) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", ["default", "mqa-tied"])
def test_loss(variant: str) -> None:
    """With and without logits, mean and sum; the same as ours."""
    model, ids = small(variant), some_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    whole = model(ids, labels=labels)
    found = model.train()(ids, labels=labels)
    assert found.logits is None and whole.logits is not None
    expected = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(whole.loss, expected)
    items = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * items).loss, expected / 2)
    assert model(ids, labels=labels, skip_logits=False).logits is not None
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.manual_seed(0)
    ours = scramble(make(variant))
    ours(ids[:, :-1], targets=ids[:, 1:]).backward()
    theirs = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_accumulation(tmp_path: Path) -> None:
    one, four = small(), small()
    a = train(one, tmp_path, per_device_train_batch_size=4)
    b = train(four, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(losses(a), losses(b), rtol=1e-4, atol=1e-4)
    close(one, four, 1e-4)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    plain, checkpointed = small().train(), small().train()
    checkpointed.gradient_checkpointing_enable()
    ids = some_ids()
    for model in (plain, checkpointed):
        model(ids, labels=ids).loss.backward()
    assert checkpointed.is_gradient_checkpointing
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    train(checkpointed, tmp_path, gradient_checkpointing=True, max_steps=1)


def test_resume(tmp_path: Path) -> None:
    whole, parts = small(), small()
    train(whole, tmp_path / "a")
    train(parts, tmp_path / "b", max_steps=4, save_strategy="steps", save_steps=2)
    for path in (tmp_path / "b").glob("checkpoint-4/*"):
        path.unlink()
    (tmp_path / "b" / "checkpoint-4").rmdir()
    again = small()
    train(again, tmp_path / "b", resume=True)
    close(again, whole)
    assert muddformer.from_pretrained(tmp_path / "b" / "checkpoint-2").config.n_layer == 5


def test_adapters_of_attention_and_connections(tmp_path: Path) -> None:
    ids = some_ids()
    targets = ["wq", "wv", r"dynamic_dense.0.w1", r"dynamic_dense.0.w2", "dynamic_dense.3.w2"]
    model = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, tmp_path / "run", learning_rate=0.1, max_steps=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    assert sum("dynamic_dense" in name for name, p in model.named_parameters() if p.requires_grad) == 6
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(small(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert tokens.shape[1] == ids.shape[1] + 3
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours = muddformer.from_pretrained(tmp_path / "merged")(ids)
        assert torch.equal(ours, merged(ids).logits)


def test_quantised_weights(tmp_path: Path) -> None:
    model, ids = small(dim=64), some_ids()
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert type(quantised.layers[0].attention.wq.weight) is not torch.nn.Parameter
    # The same as a model whose weights are the rounded ones.
    with torch.no_grad():
        for rounded, whole in zip(quantised.modules(), model.modules(), strict=True):
            if (
                hasattr(getattr(rounded, "weight", None), "dequantize")
                and type(rounded.weight) is not torch.nn.Parameter
            ):
                whole.weight.copy_(rounded.weight.dequantize())
        torch.testing.assert_close(quantised(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
