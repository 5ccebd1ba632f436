"""Trainer on two processes of the CPU: DDP and FSDP2 take the steps that one process takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from helpers.hf import small
from helpers.models import some_ids

PROCESSES = 2


class Rows(Dataset):
    """Eight sequences, all labels counted."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) * (i + 3)) % 61
        return {"input_ids": ids, "labels": ids}


def train_with_trainer(folder: str, batch: int) -> None:
    model = small()
    args = TrainingArguments(
        output_dir=folder,
        learning_rate=0.03,
        optim="sgd",
        max_steps=2,
        per_device_train_batch_size=batch,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Rows())
    trainer.train()
    trainer.save_model(f"{folder}/saved")


def sharded(folder: str) -> None:
    model, alone = small().train(), small().train()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids = some_ids()
    for each in (model, alone):
        each(ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert isinstance(a, DTensor), name
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-3, atol=1e-5)


def work(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    if kind == "ddp":
        train_with_trainer(folder, batch=2)
    else:
        sharded(folder)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(tmp_path: Path, kind: str) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path), kind), nprocs=PROCESSES)
    if kind == "ddp":
        train_with_trainer(str(tmp_path / "alone"), batch=4)
        together = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone" / "saved")
        for a, b in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert not torch.equal(alone.layers[0].attention.wq.weight, small().layers[0].attention.wq.weight)
