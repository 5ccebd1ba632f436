"""Small training runs, and what two of them are compared by."""

from __future__ import annotations

import torch

from muddformer.training.metrics import Row

MODEL = {"n_layer": 2, "dim": 16, "n_head": 2, "intermediate_size": 256, "block_size": 8, "ffn_reallocation": False}
TRAIN = {
    "batch_size": 2,
    "warmup_steps": 4,
    "log_every": 1,
    "eval_every": 10,
    "eval_batches": 2,
    "checkpoint_every": 5,
    "device": "cpu",
    "tensorboard": False,
}


def trained(row: Row) -> tuple:
    """What must be the same in a resumed run; nan is never equal."""
    return row.step, row.tokens, row.loss, row.val_loss, row.learning_rate, row.grad_norm


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
