"""The programs of examples/cpp, compiled against the installed package and run with small settings."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import muddformer
from helpers.cpp_program import build_project
from helpers.paths import ROOT, TESTS
from muddformer.inference.text import stream_text
from muddformer.inference.tokenizer import load_tokenizer, train_tokenizer

EXAMPLES = ROOT / "examples" / "cpp"
TEXT = "".join(path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("test_c*.py")))
SMALL = [
    "--layers", 2, "--dim", 32, "--heads", 2, "--block-size", 32, "--batch", 8, "--warmup", 5, "--learning-rate", 5e-3,
    "--log-every", 1,
]  # fmt: skip

pytestmark = pytest.mark.slow


def build(name: str, factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp(name)
    build_project(EXAMPLES / name, folder)
    return folder / name


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("train", tmp_path_factory)


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("generate", tmp_path_factory)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tests.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*command: object, fails: bool = False) -> bytes:
    """What a program prints; one thread, so that its sums have one order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, env=environment)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stderr if fails else result.stdout


def losses(output: bytes) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"step +(\d+)  loss (\S+)", output.decode())}


def test_train_and_resume(train: Path, text: Path, tmp_path: Path) -> None:
    """The loss falls; a run that was interrupted ends with the same bytes."""
    command = [train, *SMALL, "--steps", 40, "--save-every", 20, text]
    output = run(*command, "--output", tmp_path / "whole")
    whole = losses(output)
    assert list(whole) == list(range(1, 41))
    assert float(whole[40]) < 0.75 * float(whole[1])
    assert re.search(rb"[\d,]+ tokens/s  \d+:\d\d left", output)

    first = losses(run(*command, "--output", tmp_path / "parts", "--stop-after", 15))
    # What is left of a checkpoint that was being written when the program was ended.
    (tmp_path / "parts" / "step-00000017").mkdir()
    second = losses(run(*command, "--output", tmp_path / "parts"))
    assert list(second) == list(range(16, 41))
    assert first | second == whole
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        files = [tmp_path / folder / "step-00000040" / name for folder in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert losses(run(*command, "--output", tmp_path / "whole")) == {}


def test_train_says_what_is_wrong(train: Path, text: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ([], b"give files with text"),
        ([tmp_path / "nowhere"], b"nowhere"),
        ([text, "--width", 3], b"--width: the options are --batch"),
        ([text, "--steps", "many"], b"--steps takes a number"),
        ([text, "--dim", 33], b"dim"),
        ([text, "--block-size", 10**6], b"the text is shorter than a block"),
    ]:
        error = run(train, "--output", tmp_path / "run", *arguments, fails=True)
        assert error.startswith(b"train: ") and message in error, error


def test_train_on_token_ids(train: Path, generate: Path, text: Path, tmp_path: Path) -> None:
    """Token ids and tokenizer of the Python package; the text that comes out is the one that Python makes of it."""
    tokenizer = train_tokenizer([TEXT, "Grüße, 世界! " * 20], 300)
    ids = torch.tensor(tokenizer.encode(TEXT).ids, dtype=torch.uint16)
    (tmp_path / "train.bin").write_bytes(ids.numpy().tobytes())
    command = [train, *SMALL, "--steps", 30, "--token-bytes", 2, "--vocab-size", tokenizer.get_vocab_size()]
    output = losses(run(*command, "--output", tmp_path, tmp_path / "train.bin"))
    assert float(output[30]) < 0.9 * float(output[1])

    checkpoint = tmp_path / "step-00000030"
    (checkpoint / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    prompt = "def Grüße(世界"
    listed = ",".join(map(str, load_tokenizer(checkpoint / "tokenizer.json").encode(prompt).ids))
    how = {"temperature": 2.0, "top_k": 200, "top_p": 0.99, "seed": 3}
    options = [word for key, value in how.items() for word in (f"--{key.replace('_', '-')}", value)]
    printed = run(generate, checkpoint, "--ids", listed, "--tokens", 10, *options).decode(errors="replace")
    assert printed == prompt + "".join(stream_text(checkpoint, prompt, max_new_tokens=10, device="cpu", **how)) + "\n"
    assert b"takes --ids, not --prompt" in run(generate, checkpoint, "--prompt", "x", fails=True)
    assert run(generate, checkpoint, "--tokens", 0) == b"\n"


def test_generate_bytes_and_ids(generate: Path, tmp_path: Path) -> None:
    """A model of bytes takes and prints text, another one token ids."""
    config = muddformer.MUDDFormerConfig(
        n_layer=2, dim=32, n_head=2, vocab_size=256, intermediate_size=64, block_size=32, ffn_reallocation=False
    )
    model = muddformer.build_model(config)
    model.save_pretrained(tmp_path / "bytes")
    prompt = torch.tensor([list("né".encode())])
    expected = muddformer.generate(model, prompt, max_new_tokens=8, temperature=1.0, seed=5)[0].tolist()
    options = ["--tokens", 8, "--temperature", 1, "--seed", 5]
    assert run(generate, tmp_path / "bytes", "--prompt", "né", *options) == bytes([*expected, 10])

    model = muddformer.build_model(config.replace(vocab_size=61))
    model.save_pretrained(tmp_path / "ids")
    expected = muddformer.generate(model, torch.tensor([[5, 6]]), max_new_tokens=30)[0].tolist()
    printed = run(generate, tmp_path / "ids", "--ids", "5,6", "--temperature", 0)  # to the end of the context
    assert list(map(int, printed.split())) == expected
    for arguments, message in [
        ([tmp_path / "nowhere"], b"config.json: no such file"),
        ([tmp_path / "ids", "--ids", "61"], b"input_ids must be from 0 to vocab_size - 1 = 60"),
        ([tmp_path / "ids"], b"give --ids"),
        ([tmp_path / "ids", "--ids", "5,x"], b"--ids takes numbers with commas between, got x"),
        ([tmp_path / "ids", "--prompt", "x"], b"takes --ids, not --prompt"),
        ([tmp_path / "bytes", "--ids", "5", "--prompt", "x"], b"not both"),
        ([tmp_path / "ids", "--ids", "5", "--seed", "x"], b"--seed takes a number"),
        ([tmp_path / "ids", "--sed", "1"], b"--sed: the options are"),
    ]:
        error = run(generate, *arguments, fails=True)
        assert error.startswith(b"generate: ") and message in error, error


def test_drop_in(tmp_path_factory: pytest.TempPathFactory) -> None:
    output = run(build("drop_in", tmp_path_factory)).decode()
    assert "the stack computes what the blocks compute: true" in output
    values = [float(loss) for loss in re.findall(r"loss (\S+)", output)]
    assert values == sorted(values, reverse=True) and len(values) == 3
