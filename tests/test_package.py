"""The installed package: what it says of itself, what it refuses to load into, and that C++ projects find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import muddformer
from muddformer import _C, utils

CONSUMER = Path(__file__).parent / "consumer"


def test_build_info() -> None:
    info = utils.build_info()
    assert info["muddformer"] == muddformer.__version__
    assert info["built for torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert all(isinstance(value, str) and value for value in info.values())


def test_another_torch_is_refused() -> None:
    """One ImportError that names both versions, before the library is loaded."""
    code = "import torch; torch.__version__ = '1.0.0'; import muddformer"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert last.startswith("ImportError: muddformer")
    assert _C.torch_version.rsplit(".", 1)[0] in last and "1.0.0" in last


def test_import_needs_no_optional_package_and_no_gpu() -> None:
    blocked = "('tokenizers', 'yaml', 'rich', 'tensorboard', 'matplotlib', 'transformers')"
    block = f"import sys; [sys.modules.__setitem__(m, None) for m in {blocked}]"
    code = f"{block}; import muddformer; print(muddformer.__version__)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == muddformer.__version__, run.stderr


def test_library_needs_no_python() -> None:
    library = Path(_C.__file__).parent / "lib" / "libmuddformer.so"
    readelf = shutil.which("readelf")
    if readelf is None:
        needed = library.read_bytes().decode("latin1")
    else:
        needed = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert "libtorch_python" not in needed
    assert "libpython" not in needed


def cmake() -> str:
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.exists() else shutil.which("cmake") or "cmake"


def without_cuda_toolkit() -> dict[str, str]:
    """The environment of a machine without a CUDA toolkit."""
    folders = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA") and k != "LIBRARY_PATH"}
    return {**environment, "PATH": os.pathsep.join(folders)}


@pytest.mark.slow
@pytest.mark.parametrize("toolkit", [True, False], ids=["as-is", "without-cuda-toolkit"])
def test_consumer(tmp_path: Path, toolkit: bool) -> None:
    """tests/consumer compiles against what is installed and runs."""
    environment = dict(os.environ) if toolkit else without_cuda_toolkit()

    def run(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    prefix = f"-DCMAKE_PREFIX_PATH={utils.cmake_prefix_path}"
    run(cmake(), "-S", str(CONSUMER), "-B", str(tmp_path), prefix, "-DCMAKE_BUILD_TYPE=Debug")
    run(cmake(), "--build", str(tmp_path))
    assert muddformer.__version__ in run(str(tmp_path / "consumer"))


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


def test_source_folder_uses_the_installed_library() -> None:
    """``python -m muddformer`` in the source folder, whose package has no compiled part."""
    command = [sys.executable, "-m", "muddformer", "info"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    assert muddformer.__version__ in run.stdout
