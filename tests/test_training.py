"""Optimizer, learning rate, metrics, checkpoints and the loop."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("yaml")

import muddformer
from muddformer.errors import Diverged, InputError
from muddformer.inference.loading import find_checkpoints
from muddformer.inference.text import stream_text, stream_tokens
from muddformer.models import MUDDFormerConfig, build_model, from_pretrained
from muddformer.plots import plot_losses
from muddformer.training import loop, modelling
from muddformer.training.metrics import MetricsFile, Row, peak_memory_mib, read_metrics
from muddformer.training.optim import learning_rate, make_optimizer, parameter_groups
from muddformer.training.settings import Settings, TrainSettings
from muddformer.training.state import Checkpoint, restore_state, save_checkpoint

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


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "texts").mkdir()
    for number in range(4):
        words = random.Random(number).choices(["depth", "way", "stream", "key", "value", "query"], k=600)
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def make_settings(folder):
    data = {"paths": [str(folder / "texts")], "vocab_size": 280, "cache_dir": str(folder / "cache")}

    def make(**train) -> Settings:
        return Settings.from_dict({"model": MODEL, "data": data, "train": {**TRAIN, **train}})

    return make


def trained(row: Row) -> tuple:
    """What must be the same in a resumed run; nan is never equal."""
    return row.step, row.tokens, row.loss, row.val_loss, row.learning_rate, row.grad_norm


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------- optimizer and schedule


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["muddformer", "muddpythia"])
def test_only_matrices_decay(family, tied):
    config = {**MODEL, "model_type": family, "vocab_size": 32, "tie_word_embeddings": tied, "rotary_pct": 1.0}
    model = build_model(MUDDFormerConfig(**config, pre_norm=True, post_norm="residual"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert sorted(decayed + kept) == sorted(names.values())
    layer = ["wq", "wk", "wv", "wo"] + ["w1", "w2"] + ["w3"] * (family == "muddformer")
    assert {name.split(".")[-2] for name in decayed} == {*layer, *(() if tied else ("output",))}
    assert not any("dense" in name or "norm" in name or "embedding" in name for name in decayed)
    assert {"dense_bs.0", "dynamic_dense.0.w1.weight", "dynamic_dense.0.w2.weight"} <= set(kept)


def test_optimizer_follows_the_settings():
    model = build_model(MUDDFormerConfig(**MODEL, vocab_size=32))
    optimizer = make_optimizer(model, TrainSettings(beta1=0.8, beta2=0.9, weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (4, 10), (10, 10), (20, 10), (1, 1)])
def test_learning_rate(warmup, steps):
    settings = TrainSettings(learning_rate=2.0, min_lr_ratio=0.1, warmup_steps=warmup, steps=steps)
    rates = [learning_rate(step, settings) for step in range(1, steps + 1)]
    for step, rate in enumerate(rates, 1):
        if step <= warmup:
            assert rate == pytest.approx(2.0 * step / warmup)
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            assert rate == pytest.approx(0.2 + 1.8 * (1 + math.cos(angle)) / 2)
    if warmup < steps:
        assert rates[-1] == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------------------ metrics


def make_rows(steps, first=1):
    return [Row(n, 8 * n, 1 / n, 0.1 / n if n % 2 else None, 1e-3, 0.3, 10.0, 5.0) for n in range(first, steps + 1)]


def test_metrics_drop_what_the_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write(make_rows(6))
    file.close()
    assert read_metrics(path) == make_rows(6)
    with path.open("a") as torn:
        torn.write("7,56,0.14")
    assert read_metrics(path) == make_rows(6)
    file = MetricsFile(path, 4)
    file.write(make_rows(8, first=5))
    file.close()
    assert read_metrics(path) == make_rows(8)
    with pytest.raises(InputError, match="steps 1 to 9"):
        MetricsFile(path, 9)
    assert read_metrics(path) == make_rows(8)
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_foreign_metrics_are_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    for content in (None, b"", b"a,b\n1,2\n", b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"metrics\.csv"):
            read_metrics(path)


def test_memory_and_picture(tmp_path):
    assert 10 < peak_memory_mib(torch.device("cpu")) < 1e6
    pytest.importorskip("matplotlib")
    plot_losses({"plain": [make_rows(9)] * 2, "MUDD": [make_rows(9)] * 2}, tmp_path / "losses.png", "title")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------------------------- checkpoints


def described(step: int) -> dict:
    return {"step": step, "sequences": 0, "settings": {}, "corpus": {}, "threads": 1, "torch": ""}


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = build_model(MUDDFormerConfig(**MODEL, vocab_size=32))
    optimizer = make_optimizer(model, TrainSettings())
    ids = torch.arange(16).reshape(2, 8)
    for _ in range(2):
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


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


# --------------------------------------------------------------------------------------------------------------- loop


def test_loss_falls_and_metrics_are_complete(make_settings, tmp_path):
    result = loop.Trainer(make_settings(steps=60, learning_rate=1e-2), tmp_path / "run").fit()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert result.finished and result.step == 60 and result.val_loss == rows[-1].val_loss
    assert [row.step for row in rows] == list(range(1, 61))
    assert [row.tokens for row in rows] == [16 * n for n in range(1, 61)]
    assert [row.step for row in rows if row.val_loss is not None] == [10, 20, 30, 40, 50, 60]
    assert rows[-1].val_loss < 0.8 * rows[0].loss
    assert all(row.tokens_per_s > 0 and row.memory_mib > 0 and row.grad_norm > 0 for row in rows)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-00000055", "step-00000060"]


def test_log_interval_changes_no_number(make_settings, tmp_path):
    for every in (1, 7):
        loop.Trainer(make_settings(steps=20, log_every=every), tmp_path / f"run{every}").fit()
    first, second = (read_metrics(tmp_path / f"run{every}" / "metrics.csv") for every in (1, 7))
    assert list(map(trained, first)) == list(map(trained, second))


def test_order_of_the_data_is_the_same_for_both_models(make_settings, tmp_path):
    batches = []
    for dense in (True, False):
        trainer = loop.Trainer(make_settings().override([f"model.dense={dense}"]), tmp_path / str(dense))
        batches.append(trainer.batches(5, 20)[0])
    assert torch.equal(*batches)


def test_accumulation_equals_one_large_batch(make_settings, tmp_path):
    models = []
    for name, sizes in {"one": {"batch_size": 4}, "two": {"batch_size": 2, "accumulation": 2}}.items():
        trainer = loop.Trainer(make_settings(steps=3, **sizes), tmp_path / name)
        trainer.fit()
        models.append(trainer.model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_bfloat16(make_settings, tmp_path):
    trainer = loop.Trainer(make_settings(steps=30, dtype="bfloat16", learning_rate=1e-2), tmp_path / "run")
    trainer.fit()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert rows[-1].loss < rows[0].loss - 0.3


def test_tensorboard(make_settings, tmp_path):
    pytest.importorskip("tensorboard")
    loop.Trainer(make_settings(steps=4, tensorboard=True), tmp_path / "run").fit()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row.loss for row in rows])
    assert [event.step for event in events.Scalars("val_loss")] == [4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(make_settings, tmp_path, monkeypatch, bad):
    run = tmp_path / "run"
    schedule = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, train: bad if step == 12 else schedule(step, train))
    with pytest.raises(Diverged, match=r"step 13: loss nan and gradient norm nan.*step-00000010"):
        loop.Trainer(make_settings(steps=40, log_every=4), run).fit()
    assert [path.name for path in find_checkpoints(run)] == ["step-00000005", "step-00000010"]
    assert all(torch.isfinite(value).all() for value in from_pretrained(find_checkpoints(run)[-1]).parameters())
    assert math.isnan(read_metrics(run / "metrics.csv")[-1].loss)
    monkeypatch.undo()
    assert loop.Trainer(make_settings(steps=20), run, resume=True).fit().finished  # from step 10
    assert [row.step for row in read_metrics(run / "metrics.csv")] == list(range(1, 21))


def test_run_folder_is_not_overwritten_by_accident(make_settings, tmp_path):
    loop.Trainer(make_settings(steps=2), tmp_path / "run").fit()
    with pytest.raises(InputError, match="--resume"):
        loop.Trainer(make_settings(steps=2), tmp_path / "run")
    loop.Trainer(make_settings(steps=3), tmp_path / "run", overwrite=True).fit()
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")) == 3


def test_resume_wants_the_same_model_and_text(make_settings, tmp_path, folder):
    run = tmp_path / "run"
    loop.Trainer(make_settings(steps=5), run).fit()
    with pytest.raises(InputError, match="section 'model'"):
        loop.Trainer(make_settings(steps=9).override(["model.dim=32"]), run, resume=True)
    with pytest.raises(InputError, match="training text"):
        loop.Trainer(make_settings(steps=9).override(["data.vocab_size=270"]), run, resume=True)
    assert loop.Trainer(make_settings(steps=9), run, resume=True).fit().step == 9
    assert loop.Trainer(make_settings(steps=9), run, resume=True).fit().finished  # nothing left to do
    assert len(read_metrics(run / "metrics.csv")) == 9


# ---------------------------------------------------------------------------------------------- killed and interrupted


@pytest.fixture(scope="module")
def start_training(folder, make_settings):
    """Starts ``muddformer train`` in a process of its own."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(make_settings(steps=120, checkpoint_every=7, threads=1).to_dict()))

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "muddformer", "train", *options]
        environment = {**os.environ, "PYTHONPATH": str(Path(muddformer.__file__).parent.parent)}
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


# ----------------------------------------------------------------------------------------------------------- sampling


def test_streamed_tokens_are_those_of_generate(state):
    model = state[0].eval()
    prompt = [1, 2, 3]
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}):
        expected = muddformer.generate(model, torch.tensor([prompt]), max_new_tokens=5, seed=4, **options)
        assert prompt + list(stream_tokens(model, prompt, 5, seed=4, **options)) == expected[0].tolist()


def test_text_goes_on_beyond_the_context(state):
    model = state[0].eval()
    assert len(list(stream_tokens(model, [1] * 20, 30))) == 30  # block_size is 8


def test_streamed_text_is_whole(make_settings, tmp_path):
    trainer = loop.Trainer(make_settings(steps=1), tmp_path / "run")
    trainer.fit()
    pieces = list(stream_text(tmp_path / "run", "密 way", max_new_tokens=40, temperature=3.0, device="cpu"))
    ids = trainer.corpus.tokenizer.encode("密 way").ids
    tokens = list(stream_tokens(trainer.model.eval(), ids, 40, 3.0))
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    assert "".join(pieces) == trainer.corpus.tokenizer.decode(tokens) and len(pieces) == len(tokens) + 1


def test_run_folder_inside_the_data_can_be_resumed(make_settings, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("the query, the key and the value\n" * 60)
    settings = make_settings(steps=6).merge({"data": {"paths": [str(texts)], "pattern": "*"}})
    loop.Trainer(settings, texts / "run").fit()
    longer = settings.merge({"train": {"steps": 8}})
    assert loop.Trainer(longer, texts / "run", resume=True).fit().step == 8


def test_overwrite_keeps_the_run_until_the_text_is_read(make_settings, tmp_path):
    settings, run = make_settings(steps=5), tmp_path / "run"
    loop.Trainer(settings, run).fit()
    with pytest.raises(InputError):
        loop.Trainer(settings.merge({"data": {"paths": [str(tmp_path / "none")]}}), run, overwrite=True)
    assert find_checkpoints(run)


def test_model_and_plain_twin_start_with_equal_blocks():
    dense, plain = (modelling.make_model({**MODEL, "dense": dense}, 64, seed=3) for dense in (True, False))
    ours = dense.state_dict()
    for name, value in plain.state_dict().items():
        if "norm" not in name:
            assert torch.equal(value, ours[name]), name
