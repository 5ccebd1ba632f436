"""``muddformer convert``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import make
from helpers.paths import PACKAGE
from muddformer import from_pretrained
from muddformer.cli import main
from muddformer.cli.convert import _size
from muddformer.inference.tokenizer import train_tokenizer

pytest.importorskip("tokenizers")
IDS = torch.arange(6)[None]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A plain model whose vocabulary is as large as its tokenizer's."""
    tokenizer = train_tokenizer(["the query and the key"] * 9, 300)
    folder = tmp_path / "plain"
    make("plain", vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command ends with code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 2
    output, errors = capsys.readouterr()
    (error,) = errors.splitlines()
    assert output == "" and error.startswith("muddformer") and "error: " in error
    return error


def test_convert(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "mudd"
    options = ["--mudd", "--set", "pre_norm=true", "--set", "post_norm=residual", "--dtype", "float64", "--seed", "3"]
    assert main(["convert", str(plain), str(target), "--to", "hf", "--max-shard-size", "50KB", *options]) == 0
    output, errors = capsys.readouterr()
    assert output == f"{plain} -> {target}\n" and errors.splitlines()[-1] == "converting 100 %"
    before, model = (from_pretrained(folder, dtype=torch.float64) for folder in (plain, target))
    assert model.config.pre_norm and torch.allclose(model(IDS), before(IDS))
    assert (target / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    assert "dynamic_dense" in json.loads((target / "config.json").read_text())
    assert main(["generate", "--checkpoint", str(target), "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_going_on(plain: Path, tmp_path: Path) -> None:
    """Killed at its first line of progress, then called again."""
    program = "import os, sys; from muddformer.cli import main, progress; "
    program += "progress.print = lambda *_, **__: os._exit(9); sys.exit(main(sys.argv[1:]))"
    command = ["convert", str(plain), str(tmp_path / "b"), "--max-shard-size", "1KB"]
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run([sys.executable, "-c", program, *command], cwd=tmp_path, env=environment)
    assert done.returncode == 9 and not (tmp_path / "b").exists()
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "b.partial").glob("model-*")}
    assert shards and main(command) == 0
    assert {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in shards} == shards
    assert torch.equal(from_pretrained(tmp_path / "b")(IDS), from_pretrained(plain)(IDS))


def test_bad_input(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    assert "nothing is fetched" in fails(capsys, "EleutherAI/pythia-70m", target).lower()
    assert "is there already" in fails(capsys, plain, plain)
    assert "--set is for the connections" in fails(capsys, plain, target, "--set", "pre_norm=true")
    assert "KEY=VALUE" in fails(capsys, plain, target, "--mudd", "--set", "pre_norm")
    assert "unknown key 'pre_nrm'" in fails(capsys, plain, target, "--mudd", "--set", "pre_nrm=true")
    assert "--dtype" in fails(capsys, plain, target, "--dtype", "int8")
    assert "--max-shard-size" in fails(capsys, plain, target, "--max-shard-size", "0")
    assert "--to" in fails(capsys, plain, target, "--to", "gguf")
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint nor a run" in fails(capsys, tmp_path / "empty", target)
    keys = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**keys, "vocab_size": 200}))
    assert "has token ids up to" in fails(capsys, plain, target)
    (plain / "config.json").write_text(json.dumps({**keys, "model_type": "mistral"}))
    assert "model_type must be one of muddformer" in fails(capsys, plain, target)
    (plain / "config.json").write_text(json.dumps(keys))
    weights = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in fails(capsys, plain, target)
    torch.save({**weights, "norm.weight": os.path.exists}, plain / "pytorch_model.bin")
    assert "refused before anything in it ran" in fails(capsys, plain, target)
    (plain / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")})
    )
    (plain / "pytorch_model.bin").unlink()
    assert "pytorch_model-00001-of-00001.bin: no such file" in fails(capsys, plain, target)
    assert sorted(os.listdir(tmp_path)) == ["empty", "plain"]


def test_generate_with_another_tokenizer(capsys: pytest.CaptureFixture[str], plain: Path) -> None:
    make("plain", vocab_size=200).save_pretrained(plain)
    assert main(["generate", "--checkpoint", str(plain), "--prompt", "the"]) == 2
    assert "they do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5k", 1500), ("7", 7), ("2T", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert _size(text) == size
