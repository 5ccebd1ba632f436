"""Trainer on two processes of the CPU: DDP and FSDP2 take the steps that one process takes."""

from __future__ import annotations

import os
from pathlib import Path

import accelerate
import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from helpers.attached import attached
from helpers.hf import small
from helpers.models import some_ids
from helpers.processes import run_processes
from muddformer.hf import load_attached

PROCESSES = 2
MODELS = {"ours": small, "tied": lambda: small("mqa-tied"), "attached": lambda: attached("Qwen3")}


class Rows(Dataset):
    """Sixteen sequences, all labels counted."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) * (i + 3)) % 61
        return {"input_ids": ids, "labels": ids}


def train(model: PreTrainedModel, folder: str, batch: int, resume: bool = False, **settings: object) -> Trainer:
    given = {
        "output_dir": folder,
        "learning_rate": 0.01,  # 0.03 would blow rounding up to 1e-3 in four steps
        "adam_epsilon": 0.1,  # so that gradients of nearly zero do not become steps of a learning rate
        "max_steps": 4,
        "per_device_train_batch_size": batch,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(model=model, args=TrainingArguments(**{**given, **settings}), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def sharded_by_hand() -> None:
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


def sharded_by_trainer(kind: str, folder: str) -> None:
    """Four steps; the last two of them again, from the checkpoint between."""
    # accelerate shards on accelerators alone: here processes of the CPU pass for such.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # the default of newer versions
    multi = accelerate.DistributedType.MULTI_GPU
    accelerate.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", multi)
    options = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}, "save_strategy": "steps", "save_steps": 2}
    trainer = train(MODELS[kind](), folder, 2, **options)
    layers = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
    assert len(layers) > trainer.model.config.num_hidden_layers
    trainer.save_model(f"{folder}/whole")
    trainer = train(MODELS[kind](), folder, 2, resume=f"{folder}/checkpoint-2", **options)
    assert trainer.state.global_step == 4
    trainer.save_model(f"{folder}/resumed")


def work(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in where.items()}, CUDA_VISIBLE_DEVICES="")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    if kind == "ddp":
        train(small(), folder, 2, use_cpu=True).save_model(f"{folder}/whole")
    elif kind == "by hand":
        sharded_by_hand()
    else:
        sharded_by_trainer(kind, folder)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["ddp", "by hand", *MODELS])
def test_two_processes(tmp_path: Path, kind: str) -> None:
    run_processes(work, (str(tmp_path), kind), PROCESSES, "accelerate", "transformers.trainer")
    if kind == "by hand":
        return
    make, load = MODELS.get(kind, small), load_attached if kind == "attached" else AutoModelForCausalLM.from_pretrained
    alone, before = make(), dict(make().named_parameters())
    train(alone, str(tmp_path / "alone"), 4, use_cpu=True)
    for saved in ("whole",) if kind == "ddp" else ("whole", "resumed", "checkpoint-4"):
        together = dict(load(tmp_path / saved).named_parameters())
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(together[name], parameter, rtol=1e-4, atol=1e-4)
            assert not torch.equal(parameter, before[name]), name
