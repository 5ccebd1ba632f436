"""C++ projects that find the installed package: they train, go on with a Python checkpoint, run an exported model."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import muddformer
from helpers.cpp_program import build_project, cmake
from helpers.models import make, scramble, some_ids
from helpers.paths import ROOT, TESTS
from muddformer import utils

CONSUMER = TESTS / "consumer"


def without_cuda_toolkit() -> dict[str, str]:
    """The environment of a machine without a CUDA toolkit."""
    folders = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA") and k != "LIBRARY_PATH"}
    return {**environment, "PATH": os.pathsep.join(folders)}


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of tests/consumer, compiled without a CUDA toolkit against what is installed.

    The programs of examples/cpp and tests/cpp/parity.cpp are compiled with one, where there is one.
    """
    build = tmp_path_factory.mktemp("consumer")
    build_project(CONSUMER, build, without_cuda_toolkit())
    return build


def run(*command: object) -> str:
    """What a program prints; one thread, which is faster for models as small as these."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_consumer_trains(consumer: Path, tmp_path: Path) -> None:
    """README's program: it is in README word for word, and learns to count."""
    _, program = (CONSUMER / "train.cpp").read_text().split("\n", 1)
    assert program in (ROOT / "README.md").read_text()
    assert muddformer.__version__ in run(consumer / "train", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["default", "pythia", "pre-post", "plain"])
def test_consumer_continues_a_python_checkpoint(consumer: Path, tmp_path: Path, name: str) -> None:
    """Same tokens for the same noise, and what C++ saves is what Python saved, byte for byte."""
    model = scramble(make(name))
    model.save_pretrained(tmp_path / "python")
    run(consumer / "continue_tokens", tmp_path / "python", tmp_path / "copy")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "python" / file).read_bytes()
    loaded = muddformer.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    drawn = load_file(tmp_path / "copy" / "tokens.safetensors")
    prompt = torch.arange(3).repeat(2, 1)
    for key, options in {
        "greedy": {},
        "sampled": {"temperature": 1.5, "seed": 7},
        "top": {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "seed": 8},
    }.items():
        assert torch.equal(drawn[key], muddformer.generate(model, prompt, max_new_tokens=12, **options)), key


@pytest.mark.slow
def test_consumer_runs_an_exported_model(consumer: Path, tmp_path: Path) -> None:
    """torch.export and AOTInductor in Python, then no Python: libmuddformer brings the operators."""
    # In float64: random weights amplify the rounding of Inductor's other order of sums.
    model, ids = scramble(make("default", n_layer=3)).double(), some_ids(length=9)
    tokens = torch.export.Dim("tokens", min=2, max=model.config.block_size)
    with torch.no_grad():
        program = torch.export.export(model, (some_ids(length=6),), dynamic_shapes={"input_ids": {1: tokens}})
        assert any("muddformer" in str(node.target) for node in program.graph.nodes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        expected = model(ids)
    save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")
    run(consumer / "run_exported", package, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors")
    logits = load_file(tmp_path / "outputs.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_consumer_with_another_torch_is_refused(tmp_path: Path) -> None:
    """find_package says which torch was found and which is needed."""
    fake = tmp_path / "torch"
    for header, text in {
        "torch/headeronly/version.h": "".join(
            f"#define TORCH_VERSION_{part} {value}\n" for part, value in [("MAJOR", 1), ("MINOR", 0), ("PATCH", 0)]
        ),
        "torch/csrc/api/include/torch/torch.h": "",
    }.items():
        path = fake / "include" / header
        path.parent.mkdir(parents=True)
        path.write_text(text)
    command = [cmake(), "-S", str(CONSUMER), "-B", str(tmp_path / "build"), f"-DMUDDFORMER_TORCH_DIR={fake}"]
    run = subprocess.run([*command, f"-DCMAKE_PREFIX_PATH={utils.cmake_prefix_path}"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "has torch 1.0.0" in " ".join(run.stderr.split())
