"""Checkpoints of a run: saved whole or not at all, and everything comes back."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import MODEL, assert_equal_states, weights
from muddformer.errors import InputError
from muddformer.inference.loading import find_checkpoints
from muddformer.models import MUDDFormerConfig, build_model, from_pretrained
from muddformer.training.optim import make_optimizer
from muddformer.training.settings import TrainSettings
from muddformer.training.state import Checkpoint, restore_state, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def described(step: int) -> dict:
    return {"step": step, "sequences": 0, "settings": {}, "corpus": {}, "threads": 1, "torch": ""}


def test_checkpoint_restores_everything(tmp_path, state):
    model, optimizer = state
    folder = save_checkpoint(tmp_path, model, optimizer, "{}", described(2), keep_last=2)
    expected = torch.rand(3)
    copy = from_pretrained(folder)
    other = make_optimizer(copy, TrainSettings())
    torch.manual_seed(9)
    restore_state(Checkpoint(folder), copy, other)
    assert torch.equal(torch.rand(3), expected)
    assert_equal_states(weights(copy), weights(model))
    for one, two in zip(model.parameters(), copy.parameters(), strict=True):
        assert two.requires_grad and optimizer.state[one].keys() == other.state[two].keys()
        assert_equal_states(optimizer.state[one], other.state[two])
    assert not [path for path in folder.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_checkpoints_are_pruned_and_left_overs_removed(tmp_path, state):
    (tmp_path / "checkpoints" / ".tmp-step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".old-step-0").mkdir()
    for step in (1, 2, 10, 10, 11):  # the same step twice
        save_checkpoint(tmp_path, *state, "{}", described(step), keep_last=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000011"]


def test_of_a_link_the_link_alone_is_removed(tmp_path, state):
    first = save_checkpoint(tmp_path / "run", *state, "{}", described(1), keep_last=1)
    elsewhere = first.rename(tmp_path / "elsewhere")
    first.symlink_to(elsewhere)
    (tmp_path / "notes").mkdir()
    (first.parent / ".tmp-notes").symlink_to(tmp_path / "notes")
    save_checkpoint(tmp_path / "run", *state, "{}", described(2), keep_last=1)
    assert [path.name for path in first.parent.iterdir()] == ["step-00000002"]
    assert (elsewhere / "training.json").is_file() and (tmp_path / "notes").is_dir()


def test_interrupted_save_leaves_the_last_checkpoint(tmp_path, state, monkeypatch):
    first = save_checkpoint(tmp_path, *state, "{}", described(1), keep_last=1)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("muddformer.training.state.save_file", full)
    with pytest.raises(OSError, match="full"):
        save_checkpoint(tmp_path, *state, "{}", described(2), keep_last=1)
    assert find_checkpoints(tmp_path) == [first]
    Checkpoint(first)


@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
def test_broken_checkpoints_are_refused(tmp_path, state, name):
    folder = save_checkpoint(tmp_path, *state, "{}", described(1), keep_last=1)
    path = folder / name
    content = path.read_bytes()
    for broken in (None, b"", content[:-3], content[: len(content) // 2], b"[]", b'{"format": 7}', b'{"format": 1}'):
        path.unlink(missing_ok=True)
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(InputError, match="step-00000001"):
            Checkpoint(folder)


def test_state_of_another_model_is_refused(tmp_path, state):
    folder = save_checkpoint(tmp_path, *state, "{}", described(1), keep_last=1)
    model = build_model(MUDDFormerConfig(**{**MODEL, "n_layer": 1}, vocab_size=32))
    with pytest.raises(InputError, match="does not fit"):
        restore_state(Checkpoint(folder), model, make_optimizer(model, TrainSettings()))


def test_state_of_another_step_is_refused(tmp_path, state):
    model, optimizer = state
    folder = save_checkpoint(tmp_path, *state, "{}", described(3), keep_last=1)  # of an optimizer that made two
    with pytest.raises(InputError, match=r"training\.safetensors of .*step-00000003' is of step 2, .* of step 3"):
        restore_state(Checkpoint(folder), model, optimizer)
