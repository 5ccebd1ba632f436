"""A run that was killed or interrupted, in a process of its own, goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("yaml")


from helpers.paths import PACKAGE
from helpers.runs import assert_equal_states, trained, weights
from muddformer.inference.loading import find_checkpoints
from muddformer.models import from_pretrained
from muddformer.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start_training(folder, make_settings):
    """Starts ``muddformer train`` in a process of its own."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(make_settings(steps=120, checkpoint_every=7, threads=1).to_dict()))

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "muddformer", "train", *options]
        environment = {**os.environ, "PYTHONPATH": PACKAGE}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def wait_for_rows(process: subprocess.Popen, path: Path, rows: int) -> None:
    end = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") <= rows:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole_run(folder, start_training):
    process = start_training("--config", "config.yaml", "--output", "whole")
    assert process.wait(120) == 0, process.stderr.read().decode()
    return folder / "whole"


def assert_same_run(run: Path, whole: Path):
    assert list(map(trained, read_metrics(run / "metrics.csv"))) == list(
        map(trained, read_metrics(whole / "metrics.csv"))
    )
    one, two = (find_checkpoints(path)[-1] for path in (run, whole))
    assert_equal_states(weights(from_pretrained(one)), weights(from_pretrained(two)))


def test_killed_run_resumes_bit_for_bit(folder, start_training, whole_run):
    run = folder / "killed"
    process = start_training("--config", "config.yaml", "--output", "killed")
    for rows in (random.randrange(1, 30), random.randrange(50, 100)):
        wait_for_rows(process, run / "metrics.csv", rows)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process = start_training("--resume", "killed")
    assert process.wait(120) == 0, process.stderr.read().decode()
    assert_same_run(run, whole_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_with_a_checkpoint(folder, start_training, whole_run, number):
    run = folder / number.name
    process = start_training("--config", "config.yaml", "--output", run.name)
    wait_for_rows(process, run / "metrics.csv", 40)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"--resume" in errors and b"Traceback" not in errors
    steps = len(read_metrics(run / "metrics.csv"))
    assert 40 <= steps < 120 and find_checkpoints(run)[-1].name == f"step-{steps:08}"
    assert f"step {steps}".encode() in output
    if number == signal.SIGTERM:
        return
    process = start_training("--resume", run.name)
    assert process.wait(120) == 0, process.stderr.read().decode()
    assert_same_run(run, whole_run)
