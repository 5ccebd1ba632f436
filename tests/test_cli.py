"""The command line and the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("yaml")

import muddformer
from helpers.paths import PACKAGE
from muddformer.cli import main
from muddformer.training import demo
from muddformer.training.metrics import read_metrics

ENVIRONMENT = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
SMALL = {
    "model": {"n_layer": 2, "dim": 16, "n_head": 2, "intermediate_size": 256, "block_size": 16},
    "train": {"batch_size": 2, "eval_batches": 2, "device": "cpu", "tensorboard": False},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for number in range(4):
        (folder / f"text{number}.txt").write_text(f"the query, the key and the value {number}: größe 密 🙂\n" * 40)
    data = {"paths": [str(folder)], "pattern": "*.txt", "vocab_size": 280, "cache_dir": str(folder / "cache")}
    (folder / "run.json.yaml").write_text(json.dumps({**SMALL, "data": data}))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return str(folder / "run.json.yaml")


@pytest.fixture(scope="module")
def run(folder, config):
    assert main(["train", "--config", config, "--output", str(folder / "run"), "--steps", "5"]) == 0
    return folder / "run"


def fails(capsys, arguments, *words):
    """The command ends with code 2 and one line on stderr that holds these words, perhaps after progress."""
    capsys.readouterr()
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    *progress, error = errors.splitlines()
    assert output == "" and error.startswith("muddformer") and "error: " in error, errors
    assert all(line.startswith(("tokenizing ", "text: ", "measuring ", "training ")) for line in progress), errors
    for word in words:
        assert word in error, errors


# -------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize("command", ["", "train", "generate", "eval", "info", "convert", "demo"])
def test_help(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    output = capsys.readouterr().out
    assert "usage: muddformer" in output
    if command == "train":
        for setting in ("train.learning_rate", "data.val_fraction", "n_layer", "(0.001)", "--resume"):
            assert setting in output
    if command in ("generate", "demo"):
        assert output.count("default:") >= 3


def test_python_m(tmp_path):
    command = [sys.executable, "-m", "muddformer", "info"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "torch" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(("arguments", "word"), [
    ([], "COMMAND"),
    (["fly"], "fly"),
    (["train", "--fly"], "--fly"),
    (["train", "--steps", "many"], "--steps"),
    (["train", "--preset", "nope"], "nope"),
    (["train", "--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    (["train", "--config", "/no/such/file.txt"], ".toml"),
    (["train", "--resume", "/no/such/run"], "/no/such/run"),
    (["train", "--resume", "x", "--output", "y"], "--resume"),
    (["generate"], "--checkpoint"),
    (["generate", "--checkpoint", "x"], "--prompt"),
    (["generate", "--checkpoint", "/no/such", "--prompt", "x"], "/no/such"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--temperature", "-1"], "--temperature"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--temperature", "inf"], "--temperature"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--temperature", "nan"], "--temperature"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--top-k", "0"], "--top-k"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--top-k", "1.5"], "--top-k"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--top-p", "1.5"], "--top-p"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--top-p", "0"], "--top-p"),
    (["generate", "--checkpoint", "x", "--prompt", "\udcff"], "--prompt"),
    (["generate", "--checkpoint", "x", "--prompt", "x", "--seed", "-1"], "--seed"),
    (["info", "--preset", "nope"], "nope"),
    (["info", "--checkpoint", "/no/such"], "/no/such"),
    (["demo", "--seeds", "0"], "--seeds"),
    (["demo", "--minutes", "x"], "--minutes"),
    (["demo", "--set", "train.stepz=3"], "train.steps"),
])  # fmt: skip
def test_bad_arguments(capsys, arguments, word):
    fails(capsys, arguments, word)


@pytest.mark.parametrize("assignment", [
    "steps=3", "train=3", "=", "", "train.=3", ".steps=3", "other.steps=3", "train.steps", "train.stepz=3",
    "train.steps=0", "train.steps=-1", "train.steps=1.5", "train.steps=true", "train.steps=", "train.steps=[1]",
    "train.learning_rate=0", "train.learning_rate=.nan", "train.learning_rate=.inf", "train.learning_rate=fast",
    "train.batch_size=0", "train.accumulation=0", "train.warmup_steps=-1", "train.weight_decay=-0.1",
    "train.beta1=1", "train.beta2=-1", "train.grad_clip=0", "train.min_lr_ratio=2", "train.dtype=float16",
    "train.compile=1", "train.deterministic=2", "train.device=tpu", "train.device=meta", "train.device=cuda:99",
    "train.device=3", "train.threads=0", "train.seed=-1", "train.seed=9223372036854775808", "train.log_every=0",
    "train.eval_every=0", "train.eval_batches=0", "train.checkpoint_every=0", "train.keep_last=0",
    "train.tensorboard=maybe", "data.paths=3", "data.paths=[1]", "data.paths=[/no/such/folder]", "data.pattern=[a]",
    "data.vocab_size=256", "data.vocab_size=lots", "data.val_fraction=0", "data.val_fraction=1", "data.cache_dir=3",
    "data.pattern=*.nothing", "train.steps=[", "train.steps={", "train.steps=!!python/object:os.system", "model.dims=3",
    "model.dim=0", "model.dim=15", "model.n_head=0", "model.n_layer=x", "model.vocab_size=100", "model.ways=xyz",
    "model.block_size=100000", "model.norm_eps=-1", "model.dense=2", "model.cap=0", "model.3=3",
])  # fmt: skip
def test_bad_settings(capsys, config, tmp_path, assignment):
    output = tmp_path / "run"
    fails(capsys, ["train", "--config", config, "--output", str(output), "--set", assignment])
    assert not (output / "metrics.csv").exists()


@pytest.mark.parametrize(("name", "content", "word"), [
    ("a.yaml", b"train: {steps: 3", "YAML"),
    ("a.yaml", b"\xff\xfe\x00", "a.yaml"),
    ("a.yaml", b"- 1\n- 2", "mapping"),
    ("a.yaml", b"just text", "mapping"),
    ("a.yaml", b"train: [1]", "train"),
    ("a.yaml", b"train: {1: 2}", "train.1"),
    ("a.yaml", b"model: {1: 2}", "model"),
    ("a.yaml", b"trains: {steps: 3}", "train"),
    ("a.yaml", b"train: {step: 3}", "train.steps"),
    ("a.yaml", b"train: {steps: !!python/name:os.system }", "YAML"),
    ("a.yaml", b"[" * 5000, "YAML"),
    ("a.toml", b"[train\n", "TOML"),
    ("a.toml", b"[train]\nsteps = 'x'\n", "train.steps"),
    ("a.toml", b"[train]\nsteps = 1\nsteps = 2\n", "TOML"),
])  # fmt: skip
def test_bad_files(capsys, tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    fails(capsys, ["train", "--config", str(tmp_path / name), "--output", str(tmp_path / "run")], name, word)


def test_output_that_is_a_file(capsys, config, tmp_path):
    (tmp_path / "file").touch()
    fails(capsys, ["train", "--config", config, "--output", str(tmp_path / "file")], "file")


# ----------------------------------------------------------------------------------------------------- train, generate


def test_train_and_resume(capsys, config, tmp_path):
    run = str(tmp_path / "run")
    assert main(["train", "--config", config, "--output", run, "--steps", "4", "--seed", "7"]) == 0
    assert "step 4, held-out loss" in capsys.readouterr().out
    fails(capsys, ["train", "--config", config, "--output", run], "--overwrite")
    assert main(["train", "--resume", run, "--steps", "6"]) == 0
    assert [row.step for row in read_metrics(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4, 5, 6]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["train"]["seed"] == 7 and settings["train"]["steps"] == 6


def test_generate(capsys, run, monkeypatch):
    texts = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0", "--top-k", "3"]):
        command = ["generate", "--checkpoint", str(run), "--prompt", "größe 密", "--max-new-tokens", "40"]
        assert main([*command, "--device", "cpu", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("größe 密") and text.endswith("\n") for text in texts)
    assert texts[0] == texts[1] != texts[2]
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115  (an empty prompt)
    assert (
        main(["generate", "--checkpoint", str(run), "--prompt", "-", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_generate_from_a_broken_checkpoint(capsys, run, tmp_path, name):
    (checkpoint,) = (run / "checkpoints").iterdir()
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.name == name else content)
    fails(capsys, ["generate", "--checkpoint", str(tmp_path), "--prompt", ""], name)


def test_reader_that_goes_away(run, tmp_path):
    command = [sys.executable, "-m", "muddformer", "generate", "--checkpoint", str(run), "--prompt", "the"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "100000"], cwd=tmp_path, env=ENVIRONMENT, stdout=-1, stderr=-1
    ) as process:
        assert process.stdout.read(3) == b"the"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 141 and errors == b""


def test_terminal_without_unicode(run, tmp_path):
    command = [sys.executable, "-m", "muddformer", "generate", "--checkpoint", str(run), "--prompt", "密"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "--max-new-tokens", "3"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"?") and done.stderr == b""


def test_info(capsys, run, config):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert muddformer.__version__ in output and torch.__version__ in output
    assert main(["info", "--checkpoint", str(run)]) == 0
    trained = capsys.readouterr().out
    assert '"n_layer": 2' in trained and "parameters: " in trained
    assert main(["info", "--preset", "demo"]) == 0
    assert '"dim": 128' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- demo


def test_demo_writes_its_results(capsys, config, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "_FEWEST_STEPS", 4)
    monkeypatch.setattr(demo, "_train_apart", demo._train)  # in this process, for speed
    overrides = [f"data.{key}={value}" for key, value in json.loads(Path(config).read_text())["data"].items()]
    overrides += [f"model.{key}={value}" for key, value in SMALL["model"].items()]
    overrides += ["train.steps=8", "train.eval_every=4", "train.batch_size=2", "train.device=cpu"]
    options = [f"--set={override}" for override in overrides]
    code = main(["demo", "--output", str(tmp_path / "demo"), "--seeds", "2", *options])
    output = capsys.readouterr().out
    assert code in (0, 1)  # eight steps show nothing
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "report.md", "losses.png", "table.csv", "sample.txt", "runs",
    }  # fmt: skip
    table = (tmp_path / "demo" / "table.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["model", "plain", "MUDD"]
    assert "| MUDD |" in output and "| MUDD |" in (tmp_path / "demo" / "report.md").read_text()
    assert "Held-out loss" in output
    fails(capsys, ["demo", "--output", str(tmp_path / "demo"), "--minutes", "0", *options], "--minutes")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"muddformer {muddformer.__version__}\n"


def test_inspect(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(run), "--tokens", "64", "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "first token" in output and len(output.splitlines()) == 3
    pictures = {"weights.png", "similarities.png", "sinks.png", "norms.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"inspection.json", *pictures}
    values = json.loads((tmp_path / "inspection.json").read_text())
    assert values["tokens"] == 64 and len(values["norms"]) == 1 and len(values["history_rms"]) == 3


def test_inspect_a_checkpoint(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    checkpoint, text = next((run / "checkpoints").iterdir()), tmp_path / "some.txt"
    fails(capsys, ["inspect", str(checkpoint)], "--text")
    fails(capsys, ["inspect", str(checkpoint), "--text", str(text)], "some.txt")
    text.write_text("q")
    fails(capsys, ["inspect", str(checkpoint), "--text", str(text)], "too few")
    text.write_text("the query, the key and the value " * 9)
    assert main(["inspect", str(checkpoint), "--text", str(text), "--output", str(tmp_path / "out")]) == 0
    assert "text: 1 files" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"content": text.read_text()}) + "\n")
    arguments = ["inspect", str(checkpoint), "--text", str(rows), "--output", str(tmp_path / "rows")]
    fails(capsys, arguments, "no text in the field 'text'", "--text-field")
    assert main([*arguments, "--text-field", "content"]) == 0
    first, second = (json.loads((tmp_path / name / "inspection.json").read_text()) for name in ("out", "rows"))
    assert first["sinks"] == second["sinks"]
