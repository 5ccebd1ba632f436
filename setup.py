"""Builds muddformer with CMake. Everything about the build is in CMakeLists.txt; this only drives it.

Environment: MUDDFORMER_CUDA (AUTO, ON, OFF), MAX_JOBS, CMAKE_ARGS (more arguments for CMake), CMAKE_CUDA_ARCHITECTURES
through CUDAARCHS or TORCH_CUDA_ARCH_LIST.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text().split("project(")[1]).group(1)


def jobs() -> int:
    """Parallel compilations: MAX_JOBS, else the number of cores, at most one for every 3 GiB of memory."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (3 << 30)))


def tool_path() -> str:
    """PATH with the folders of pip's cmake and ninja in front, where they are installed."""
    folders = [os.environ.get("PATH", "")]
    for module, attribute in (("ninja", "BIN_DIR"), ("cmake", "CMAKE_BIN_DIR")):
        with contextlib.suppress(ImportError):
            folders.insert(0, getattr(importlib.import_module(module), attribute))
    return os.pathsep.join(folders)


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the Python package."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError:
            sys.exit(
                "muddformer: torch is not installed in this Python. Install it first (pip install torch), then build "
                "with pip install --no-build-isolation ."
            )
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            sys.exit("muddformer: no C++ compiler was found. Install one with C++20 (g++ 11 or clang 14), or set CXX.")
        environment = {**os.environ, "PATH": tool_path()}
        if not shutil.which("cmake", path=environment["PATH"]):
            sys.exit("muddformer: cmake was not found. Install it with pip install cmake ninja.")
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder for each Python and torch, so that a second build is incremental.
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__.split('+')[0]}"
        build = ROOT / "build" / f"cmake-{tag}"
        arguments = [
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DMUDDFORMER_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DMUDDFORMER_CUDA={os.environ.get('MUDDFORMER_CUDA', 'AUTO')}",
            "-DMUDDFORMER_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if shutil.which("ninja", path=environment["PATH"]):
            arguments.append("-GNinja")
        if shutil.which("ccache"):  # which takes no source with precompiled headers from its cache, as it is set up
            arguments += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
            arguments.append("-DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            for command in (
                ["-S", str(ROOT), "-B", str(build), *arguments],
                ["--build", str(build), "--parallel", str(jobs())],
                ["--install", str(build)],
                # An editable install uses the source folder, where setuptools copies the module alone.
                *([["--install", str(build), "--prefix", str(ROOT / "muddformer")]] if self.editable_mode else []),
            ):
                subprocess.run(["cmake", *command], check=True, env=environment)
        except subprocess.CalledProcessError as error:
            sys.exit(f"muddformer: the build stopped (exit code {error.returncode}); CMake's message is above.")


setup(
    version=VERSION,
    ext_modules=[Extension("muddformer._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
