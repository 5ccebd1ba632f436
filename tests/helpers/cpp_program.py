"""Builds a C++ program against the installed package, as a project of somebody else would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from muddformer import utils

PROJECT = """\
cmake_minimum_required(VERSION 3.26)
project({name} LANGUAGES CXX)
find_package(muddformer CONFIG REQUIRED)
add_executable({name} {source})
target_link_libraries({name} PRIVATE muddformer::muddformer)
target_compile_options({name} PRIVATE -Wall -Wextra)
"""


def cmake() -> str:
    """CMake of the Python environment, or the one on the PATH."""
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.exists() else shutil.which("cmake") or "cmake"


def build_project(project: Path, build: Path, environment: dict[str, str] | None = None) -> None:
    """Compiles a CMake project that finds the installed package, in the folder ``build``.

    Args:
        environment: of CMake and the compiler. None: this process's.

    Raises:
        RuntimeError: with what CMake or the compiler said.
    """
    configure = [cmake(), "-S", str(project), "-B", str(build), f"-DCMAKE_PREFIX_PATH={utils.cmake_prefix_path}"]
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    make = [cmake(), "--build", str(build), "--parallel", str(min(4, os.cpu_count() or 1))]
    for command in ([*configure, "-DCMAKE_BUILD_TYPE=Release", *launcher], make):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode != 0:
            raise RuntimeError(f"{project} was not built: {result.stdout}{result.stderr}")


def build_program(source: Path, folder: Path) -> Path:
    """Compiles one source file in ``folder``; returns the program.

    Raises:
        RuntimeError: with what CMake or the compiler said.
    """
    name, build = source.stem, folder / "build"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CMakeLists.txt").write_text(PROJECT.format(name=name, source=source.resolve()))
    build_project(folder, build)
    return build / name
