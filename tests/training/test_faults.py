"""Runs that go wrong: broken checkpoints, folders that are not ours, two processes at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from muddformer.errors import InputError
from muddformer.inference.loading import find_checkpoints, resolve_checkpoint
from muddformer.training.loop import Trainer, load_run_settings
from muddformer.training.metrics import read_metrics
from muddformer.training.settings import Settings, TrainSettings

KEY = "optimizer/layers.0.attention.wq.weight"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(make_settings: Callable[..., Settings], tmp_path: Path) -> Path:
    """A run of six steps with checkpoints after 2, 4 and 6."""
    run = tmp_path / "run"
    Trainer(make_settings(steps=6, checkpoint_every=2, keep_last=3), run).fit()
    return run


def resume(run: Path, steps: int = 8) -> Trainer:
    return Trainer(load_run_settings(run).merge({"train": {"steps": steps}}), run, resume=True)


def change(run: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = find_checkpoints(run)[-1] / "training.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


TAMPERED = {
    "smaller": (lambda t: t.update({f"{KEY}/exp_avg": torch.zeros(3)}), r"exp_avg must be \[16, 16\] .* got \[3\]"),
    "larger": (lambda t: t.update({f"{KEY}/exp_avg": torch.zeros(32, 16)}), r"must be \[16, 16\] .* got \[32, 16\]"),
    "dtype": (lambda t: t.update({f"{KEY}/exp_avg": torch.zeros(16, 16).long()}), "torch.float32, got .* torch.int64"),
    "one missing": (lambda t: t.pop(f"{KEY}/exp_avg"), f"lacks {KEY}/exp_avg"),
    "all missing": (lambda t: [t.pop(k) for k in list(t) if k.startswith(KEY)], f"lacks {KEY}/exp_avg, .*step"),
    "unknown entry": (lambda t: t.update({f"{KEY}/foo": torch.zeros(3)}), f"has unknown {KEY}/foo"),
    "unknown parameter": (
        lambda t: t.update({"optimizer/z/exp_avg": torch.zeros(3)}),
        "has unknown optimizer/z/exp_avg",
    ),
    "not finite": (lambda t: t[f"{KEY}/exp_avg"].fill_(float("nan")), f"values of {KEY}/exp_avg that are not finite"),
    "negative step": (lambda t: t.update({f"{KEY}/step": torch.tensor(-5.0)}), f"negative values of {KEY}/step"),
    "short generator": (lambda t: t.update({"rng/cpu": t["rng/cpu"][:10].clone()}), "rng/cpu must be"),
    "no generator": (lambda t: t.pop("rng/cpu"), "lacks rng/cpu"),
    "generator of floats": (lambda t: t.update({"rng/cpu": t["rng/cpu"].float()}), "rng/cpu must be .* torch.uint8"),
}


@pytest.mark.parametrize("edit, message", TAMPERED.values(), ids=TAMPERED)
def test_a_state_that_does_not_fit(run: Path, edit: Callable[..., object], message: str) -> None:
    change(run, edit)
    with pytest.raises(InputError, match=message):
        resume(run)


@pytest.mark.parametrize("name", ["step", "sequences", "settings", "corpus", "threads", "torch", "format"])
@pytest.mark.parametrize("value", [None, "x", -7, [1]])
def test_a_training_json_that_says_what_cannot_be(run: Path, name: str, value: object) -> None:
    path = find_checkpoints(run)[-1] / "training.json"
    if name == "torch" and value == "x":
        return  # a version like any other
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(InputError, match=r"step-00000006' ?(is not of format|: \w+ in training.json must)"):
        resume(run)


def test_broken_files_name_the_checkpoint_before(run: Path) -> None:
    newest = find_checkpoints(run)[-1]
    for name, text in (("training.json", "[" * 100000), ("training.json", "null"), ("model.safetensors", "")):
        kept = (newest / name).read_bytes()
        (newest / name).write_text(text)
        with pytest.raises(InputError, match=r"To go on from step-00000004, remove .*step-00000006"):
            resume(run)
        (newest / name).write_bytes(kept)
    for text in ("null", "[1]", "[" * 100000, '{"train": 3}', '{"mod'):
        (run / "settings.json").write_text(text)
        with pytest.raises(InputError, match=r"settings.json' is broken"):
            load_run_settings(run)


def test_folders_of_others_are_left_alone(run: Path) -> None:
    folder, newest = run / "checkpoints", find_checkpoints(run)[-1]
    copies = ["step-00000002-best", "step-00000009 (copy)", "step-backup", "step-00000001"]
    for name in copies:
        shutil.copytree(newest, folder / name)
    (folder / "step-99999999").mkdir()
    (folder / "step-88888888").write_text("a file")
    (folder / ".tmp-step-00000008").write_text("a file")
    assert [path.name for path in find_checkpoints(run)][-1] == "step-00000006"
    assert resume(run).fit().step == 8
    assert [path.name for path in find_checkpoints(run)] == ["step-00000001", *(f"step-0000000{n}" for n in (4, 6, 8))]
    assert all((folder / name / "model.safetensors").is_file() for name in copies)


def test_lost_metrics_do_not_stop_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:4]))
    assert resume(run).fit().step == 8
    assert "lacks 3 of the rows of steps 1 to 6" in capsys.readouterr().err
    assert [row.step for row in read_metrics(run / "metrics.csv")] == [1, 2, 3, 7, 8]
    (run / "metrics.csv").unlink()
    assert resume(run, 9).fit().step == 9
    assert "the rows of steps 1 to 8 are lost" in capsys.readouterr().err


def test_changed_settings_are_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_run_settings(run).merge({"train": {"steps": 7, "learning_rate": 1e-9}})
    Trainer(settings, run, resume=True)
    said = capsys.readouterr().err
    assert "train.steps: 7, before 6" in said and "train.learning_rate: 1e-09, before" in said


def test_one_process_at_a_time(run: Path, make_settings: Callable[..., Settings]) -> None:
    holder = "import sys, time; from pathlib import Path; from muddformer._files import FileLock"
    holder += "; lock = FileLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(run / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"run in .* is in use by process {process.pid}"):
                Trainer(make_settings(steps=8), run, **options)
        assert len(find_checkpoints(run)) == 3
    finally:
        process.kill()  # as kill -9: nothing is left behind
        process.wait()
    assert resume(run).fit().step == 8


def test_numbers_and_names_as_people_write_them() -> None:
    assert Settings().override(["train.steps=1e3"]).train == TrainSettings(steps=1000)
    with pytest.raises(InputError, match=r"unknown key 'train.lr'; did you mean 'train.learning_rate'"):
        Settings().override(["train.lr=1e-3"])
    with pytest.raises(InputError, match=r"train.steps must be an integer, got 2\.5"):
        Settings().override(["train.steps=2.5"])


def test_what_differs_is_said(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = load_run_settings(run)
    with pytest.raises(InputError, match=r"section 'model' is not the one of checkpoint .*: dim 32 \(there 16\)"):
        Trainer(settings.merge({"model": {"dim": 32}}), run, resume=True)
    with pytest.raises(InputError, match=r"does not exist\. If the text was moved, .* --set data\.paths=PATH"):
        Trainer(settings.merge({"data": {"paths": [str(tmp_path / "gone")]}}), run, resume=True)
    moved = tmp_path / "texts"
    shutil.copytree(settings.data.paths[0], moved)
    trainer = Trainer(settings.merge({"data": {"paths": [str(moved)]}, "train": {"steps": 7}}), run, resume=True)
    assert trainer.fit().step == 7
    assert f"data.paths: ['{moved}'], before ['{settings.data.paths[0]}']" in capsys.readouterr().err


def test_a_name_of_a_hub_is_not_fetched() -> None:
    with pytest.raises(InputError, match="Nothing is fetched here: download a model first"):
        resolve_checkpoint(Path("some-org/some-model"))
