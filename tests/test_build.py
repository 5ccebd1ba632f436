"""The build: in a folder with spaces, as a part of another project, and what the library shows of itself."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from helpers.cpp_program import cmake
from helpers.paths import ROOT
from muddformer import _C

LIBRARY = Path(_C.__file__).parent / "lib" / "libmuddformer.so"
OPTIONS = ["-DMUDDFORMER_CUDA=OFF", f"-DMUDDFORMER_TORCH_DIR={Path(torch.__file__).parent}",
           f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip


def configure(source: Path, build: Path) -> dict[str, str]:
    """Configures a project, and returns what CMake keeps of it."""
    run = subprocess.run([cmake(), "-S", str(source), "-B", str(build), *OPTIONS], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return dict(re.split(r":\w+=", line, maxsplit=1) for line in lines if re.match(r"[\w-]+:\w+=", line))


def test_folder_with_spaces(tmp_path: Path) -> None:
    """Every command that make would run names the folder as one word, and CMake takes it."""
    tree = tmp_path / "a folder of mine"
    for name in ("Makefile", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "muddformer").mkdir()
    for target in ("test", "asan", "valgrind", "docs", "lint", "demo", "report", "smoke"):
        made = subprocess.run(["make", "--dry-run", target], cwd=tree, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        commands = re.sub(r"\\\n\s*", " ", made.stdout).splitlines()
        for line in (line for line in commands if str(tree) in line):
            assert all(str(tree) in word for word in shlex.split(line) if "a folder" in word or "of mine" in word), line
    cache = configure(tree, tree / "build" / "cpp")
    assert cache["CMAKE_BUILD_TYPE"] == "Release"


def test_part_of_another_project(tmp_path: Path) -> None:
    """It sets nothing of the project that includes it, installs nothing there, and can be linked."""
    (tmp_path / "CMakeLists.txt").write_text(f"""\
cmake_minimum_required(VERSION 3.26)
project(parent LANGUAGES CXX)
add_subdirectory("{ROOT}" muddformer)
add_executable(program program.cpp)
target_link_libraries(program PRIVATE muddformer::muddformer)
install(TARGETS program)
foreach(name IN ITEMS CMAKE_CXX_STANDARD CMAKE_CXX_VISIBILITY_PRESET CMAKE_POSITION_INDEPENDENT_CODE)
  if(DEFINED ${{name}})
    message(FATAL_ERROR "${{name}} is set")
  endif()
endforeach()
get_directory_property(options COMPILE_OPTIONS)
if(options)
  message(FATAL_ERROR "options: ${{options}}")
endif()
""")
    (tmp_path / "program.cpp").write_text("#include <muddformer/muddformer.h>\nint main() { return 0; }\n")
    cache = configure(tmp_path, tmp_path / "build")
    assert cache.get("CMAKE_BUILD_TYPE", "") == ""
    assert cache["MUDDFORMER_INSTALL"] == "OFF"
    forced = [name for name in cache if name.startswith(("BUILD_", "CMAKE_CXX_STANDARD", "CMAKE_POSITION"))]
    assert forced == []
    rules = (tmp_path / "build" / "muddformer" / "cmake_install.cmake").read_text()
    assert "libmuddformer" not in rules


def test_exported_symbols_are_ours() -> None:
    readelf = subprocess.run(["nm", "-DC", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    names = [line.split(" ", 2)[2] for line in readelf.stdout.splitlines()]
    ours = re.compile(
        r"(muddformer::|(vtable|VTT|typeinfo|typeinfo name|guard variable) for muddformer::|.*thunk to muddformer::)"
    )
    assert len(names) > 50
    assert [name for name in names if not ours.match(name)] == []


def test_library_names_no_folder_of_its_build() -> None:
    content = LIBRARY.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent / "include"):
        assert str(folder).encode() not in content
    package = LIBRARY.parents[1] / "share" / "cmake" / "muddformer"
    for path in package.glob("*.cmake"):
        assert str(Path(torch.__file__).parent) not in path.read_text()


def test_readme_names_what_the_build_needs() -> None:
    requires = re.search(r"requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())[1]
    for page in ("README.md", "docs/install.md"):
        install = re.search(r"pip install torch .*", (ROOT / page).read_text())[0]
        assert '"setuptools>=77"' in install
        assert all(re.match(r"[\w-]+", word)[0] in install for word in re.findall(r'"(.*?)"', requires))


def test_doc_comments_name_what_is_there() -> None:
    """As clang's -Wdocumentation: a name after @param is a parameter, one a line."""
    for path in sorted((ROOT / "csrc").rglob("*.h")):
        text = path.read_text()
        for comment in re.finditer(r"((?:^ *///.*\n)+)((?:.*\n)*?.*[;{]$)", text, re.M):
            for name in re.findall(r"@param (\S+)", comment[1]):
                assert re.search(rf"\b{re.escape(name)}\b", comment[2].replace("\n", " ")), f"{path}: @param {name}"
