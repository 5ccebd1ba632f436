"""The installed package: what it says of itself, what it needs and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import muddformer
from helpers.cpp_program import cmake
from helpers.paths import ROOT
from muddformer import _C, utils
from muddformer.errors import MissingPackage, require


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


def test_source_folder_uses_the_installed_library() -> None:
    """``python -m muddformer`` in the source folder, whose package has no compiled part."""
    command = [sys.executable, "-m", "muddformer", "info"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert muddformer.__version__ in run.stdout


def test_missing_package_says_how_to_install_it():
    with pytest.raises(MissingPackage, match=r'no_such_package.*pip install "muddformer\[train\]"'):
        require("no_such_package.part")


def test_import_loads_no_compiler_and_no_sharded_tensors() -> None:
    """They take longer to import than all of ours; torch imports them when they are used."""
    slow = "('torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'torch.distributed.fsdp')"
    code = f"import sys, torch; before = set(sys.modules); import muddformer; print([m for m in {slow} "
    code += "if m in set(sys.modules) - before])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_source_distribution_is_whole(tmp_path: Path) -> None:
    """It has all of the sources, and CMake finds in it what it names."""
    made_by_builds = {"__pycache__", "include", "lib", "share"}
    files = ["CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "MANIFEST.in"]
    for folder in ("csrc", "muddformer", "tests", "docs", "benchmarks", "examples"):
        found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
        files += [str(path) for path in found if not made_by_builds & {*path.parts} and path.suffix != ".so"]
    for name in files:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    made = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert [name for name in files if not (folder / name).is_file()] == []
    torch_folder = Path(torch.__file__).parent
    options = ["-DMUDDFORMER_CUDA=OFF", "-DMUDDFORMER_PYTHON=ON", f"-DMUDDFORMER_TORCH_DIR={torch_folder}"]
    configure = [cmake(), "-S", str(folder), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
    run = subprocess.run([*configure, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
