"""A full disk: one line that names the file and the last good checkpoint, nothing left over, old files whole.

A limit on the size of files stands for the full disk: writing fails in the same places, with another number.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers.models import make
from helpers.paths import PACKAGE
from muddformer.inference.loading import find_checkpoints
from muddformer.models import from_pretrained
from muddformer.training.loop import Trainer, load_run_settings
from muddformer.training.settings import Settings
from muddformer.training.state import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("size, name", [(100, "model.safetensors"), (0, "model.safetensors")])
def test_save_pretrained_names_the_file(tmp_path: Path, size: int, name: str) -> None:
    model = make(n_layer=2, dim=16, n_head=2)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    with torch.no_grad():
        model.norm.weight.add_(1)
    with largest_file(size), pytest.raises(OSError) as caught:
        model.save_pretrained(tmp_path)
    assert caught.value.filename == str(tmp_path / name)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.safetensors",
                                  "training.json"])  # fmt: skip
def test_a_checkpoint_that_cannot_be_written(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tmp_path / "run"
    Trainer(make_settings(steps=2, checkpoint_every=2), run).fit()
    before = files(run / "checkpoints")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    trainer = Trainer(load_run_settings(run).merge({"train": {"steps": 4}}), run, resume=True)
    monkeypatch.setattr(os, "replace", full)
    message = rf"step-00000004/{name}: cannot be written: No space .* last good checkpoint is .*step-00000002$"
    with pytest.raises(OSError, match=message):
        trainer.fit()
    assert files(run / "checkpoints") == before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert Trainer(load_run_settings(run), run, resume=True).fit().step == 4


def test_the_command_line_says_it_in_one_line(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(make_settings(steps=2, checkpoint_every=2), run).fit()
    newest = find_checkpoints(run)[-1]
    limit = (newest / "model.safetensors").stat().st_size // 2
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    program += "import sys; from muddformer.cli import main; "
    program += f"sys.exit(main(['train', '--resume', {str(run)!r}, '--steps', '4']))"
    environment = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("muddformer: error: ") and "Traceback" not in ended.stderr
    assert "model.safetensors: cannot be written" in last and last.endswith(f"the last good checkpoint is {newest}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [newest.name]
    Checkpoint(newest), from_pretrained(newest)


def test_metrics_that_cannot_be_written(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(make_settings(steps=2, checkpoint_every=2), run).fit()
    trainer = Trainer(load_run_settings(run).merge({"train": {"steps": 40}}), run, resume=True)
    with (
        largest_file((run / "metrics.csv").stat().st_size + 20),
        pytest.raises(OSError, match=r"metrics\.csv: cannot be written: .* last good checkpoint is .*step-00000002$"),
    ):
        trainer.fit()
    assert Trainer(load_run_settings(run), run, resume=True).fit().step == 40


def test_token_files_that_cannot_be_written(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_settings(steps=2).override([f"data.cache_dir={tmp_path / 'cache'}"])
    with largest_file(200), pytest.raises(ValueError, match=r"cannot write the token files to .*data\.cache_dir"):
        Trainer(settings, tmp_path / "run")
    assert not list((tmp_path / "cache").iterdir())
