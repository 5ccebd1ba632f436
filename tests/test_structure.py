"""Imports and includes go down only: no circle, nothing that reaches for a floor above its own, in both languages.

``python tests/test_structure.py [ROOT]`` lists what is wrong with a checkout and fails if there is anything.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each line is a floor and may use itself and those above it in the table. A name is a folder or a file.
PYTHON_FLOORS = (
    ("ops", "reference", "errors", "_checks", "_dispatch", "_files", "_imports", "_library", "utils"),
    ("_flops", "_inductor", "_onnx", "_sharding", "_tracing"),
    ("plots",),
    ("nn",),
    ("models",),
    ("inference",),
    ("training",),
    ("cli", "__main__", "__init__"),
    ("hf", "distributed"),
)
CPP_FLOORS = (
    ("macros.h", "version.h"),
    ("kernels",),
    ("ops",),
    ("nn",),
    ("io",),
    ("models",),
    ("inference",),
    ("ops.h", "nn.h", "models.h", "muddformer.h"),
    ("python",),
)
# What uses these alone of the floors below, not all of them.
PYTHON_ONLY = {"plots": ("plots", "errors")}
CPP_ONLY = {"io": ("io", "ops/common", "macros.h")}
NOT_IN_KERNELS = ("torch/", "ATen/", "c10/")  # kernels are CUDA alone
COMPILED = {"muddformer._C"}
STANDARD = sys.stdlib_module_names | {"tomli"}  # tomllib of Python 3.10

Graph = dict[str, dict[str, str]]  # what uses what: user -> used -> the line that says so


def circles(graph: Graph) -> Iterator[str]:
    """A shortest circle through every member that is in one, each circle once."""
    told: set[str] = set()
    for start in sorted(graph):
        before, queue = {start: start}, [start]
        for user in queue:
            for used in sorted(graph.get(user, ())):
                if used == start and start not in told:
                    chain = [user]
                    while chain[-1] != start:
                        chain.append(before[chain[-1]])
                    told |= set(chain)
                    chain = [*chain[::-1], start]
                    lines = ", ".join(graph[a][b] for a, b in itertools.pairwise(chain))
                    yield f"a circle: {' -> '.join(chain)} ({lines})"
                if used not in before:
                    before[used] = user
                    queue.append(used)


def lies_in(path: str, places: tuple[str, ...]) -> bool:
    """Whether ``nn/stack.py`` is, or is in, one of the places: folders, or files with or without the ending."""
    return any(path == place or path.startswith((f"{place}/", f"{place}.")) for place in places)


def upward(graph: Graph, floors: tuple[tuple[str, ...], ...], only: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Everything that uses a floor above its own, or more than it may; and files that are on no floor."""
    paths = sorted({*graph, *(used for uses in graph.values() for used in uses)})
    floor = {path: i for path in paths for i, places in enumerate(floors) if lies_in(path, places)}
    yield from (f"{path} is on no floor of tests/test_structure.py" for path in paths if path not in floor)
    for user, uses in sorted(graph.items()):
        allowed = [places for place, places in only.items() if lies_in(user, (place,))]
        for used, line in sorted(uses.items()):
            if user not in floor or used not in floor:
                continue
            if floor[used] > floor[user]:
                above, below = (", ".join(floors[floor[path]]) for path in (used, user))
                yield f"{line}: {user} uses {used}, but {above} is above {below}"
            elif any(not lies_in(used, places) for places in allowed):
                yield f"{line}: {user} uses {used}, but may use {', '.join(allowed[0])} alone"


# --------------------------------------------------------------------------------------------------------------- Python


def python_modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their full names, the package itself among them."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def enclosing(name: str) -> set[str]:
    """``a.b.c`` -> ``a.b``, ``a``."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def imported(tree: ast.AST, name: str, is_package: bool, modules: dict[str, Path]) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement of a module, wherever it stands, with the full name of a module that it wants.

    ``from PACKAGE import NAME`` wants the module PACKAGE.NAME if there is one, or else PACKAGE.
    """
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield node, whole if whole in modules or whole in COMPILED else source


def python_graph(package: Path) -> tuple[Graph, list[str]]:
    """What imports what, by paths in the package, and what is imported inside functions, around a circle or a check.

    To import a module runs the ``__init__`` of every package around it: who imports it from outside uses them too.
    """
    modules, graph, inside = python_modules(package), {}, []
    paths = {name: path.relative_to(package).as_posix() for name, path in modules.items()}
    for name, path in modules.items():
        uses = graph.setdefault(paths[name], {})
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        in_functions = {node for function in functions for node in ast.walk(function)}
        for node, wanted in imported(tree, name, path.name == "__init__.py", modules):
            line = f"{package.name}/{paths[name]}:{node.lineno}"
            if node in in_functions and wanted.split(".")[0] not in STANDARD:
                inside.append(f"{line}: {wanted} is imported inside a function")
            for used in {wanted, *(enclosing(wanted) - enclosing(name) - {name})} & modules.keys() - {name}:
                uses[paths[used]] = line
    return graph, inside


def python_complaints(package: Path) -> list[str]:
    graph, inside = python_graph(package)
    return [*circles(graph), *upward(graph, PYTHON_FLOORS, PYTHON_ONLY), *inside]


# ------------------------------------------------------------------------------------------------------------------ C++


def cpp_graph(csrc: Path) -> tuple[Graph, list[str]]:
    """What includes what, by paths in csrc, and the includes that are not to be found or not for kernels."""
    graph, wrong = {}, []
    paths = [path.relative_to(csrc).as_posix() for path in csrc.rglob("*")]
    sources = {path for path in paths if path.endswith((".h", ".cuh", ".cpp", ".cu"))}
    headers = sources | {path.removesuffix(".in") for path in paths if path.endswith(".h.in")}
    for name in sorted(sources):
        uses = graph.setdefault(name, {})
        for number, text in enumerate((csrc / name).read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r'\s*#\s*include\s*(?:"(.+)"|<(.+)>)', text)
            if not found:
                continue
            line = f"{csrc.name}/{name}:{number}"
            header = (found[1] or found[2]).removeprefix("muddformer/")
            if name.startswith("kernels/") and header.startswith(NOT_IN_KERNELS):
                wrong.append(f"{line}: {name} includes {header}, but a kernel does without torch")
            if found[1] is None and found[2] == header:
                continue  # somebody else's header
            beside = ((csrc / name).parent / header).resolve()
            beside = beside.relative_to(csrc.resolve()).as_posix() if beside.is_relative_to(csrc.resolve()) else ""
            for used in (beside, header):
                if used in headers:
                    uses[used] = line
                    break
            else:
                wrong.append(f"{line}: {header} is not in {csrc.name}")
    return graph, wrong


def cpp_complaints(csrc: Path) -> list[str]:
    graph, wrong = cpp_graph(csrc)
    return [*circles(graph), *upward(graph, CPP_FLOORS, CPP_ONLY), *wrong]


# ---------------------------------------------------------------------------------------------------------------- tests


ROOT = Path(__file__).resolve().parent.parent


def test_python_imports_go_down() -> None:
    complaints = python_complaints(ROOT / "muddformer")
    assert not complaints, "\n".join(complaints)


def test_cpp_includes_go_down() -> None:
    complaints = cpp_complaints(ROOT / "csrc")
    assert not complaints, "\n".join(complaints)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


SOUND = {
    "__init__.py": "from muddformer import nn, ops\nfrom .models import build\n",
    "__main__.py": "from muddformer.cli import main\n",
    "_library.py": "from muddformer import _C\n",
    "ops.py": "from . import _library\n",
    "errors.py": "",
    "plots.py": "from .errors import require\n",
    "nn/__init__.py": "from .stack import Stack\nfrom . import plan\n",
    "nn/stack.py": "from .. import ops\nfrom . import plan\nfrom .plan import a_plan\n",
    "nn/plan.py": "import torch\n",
    "models/__init__.py": "from .model import build\n",
    "models/model.py": "from muddformer.nn import Stack\nfrom ..nn.plan import a_plan\n",
    "training/loop.py": "from ..models import build\nfrom .. import plots\ndef f():\n    import resource\n",
    "cli/__init__.py": "from muddformer.training import loop\n",
}


def test_a_sound_package(tmp_path: Path) -> None:
    assert python_complaints(write(tmp_path / "muddformer", SOUND)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"nn/plan.py": "from ..models.model import build\n"},
            [
                "a circle: models/__init__.py -> models/model.py -> nn/plan.py -> models/__init__.py",
                "nn/plan.py:1: nn/plan.py uses models/__init__.py, but models is above nn",
            ],
        ),
        ({"nn/plan.py": "from .stack import x\n"}, ["a circle: nn/plan.py -> nn/stack.py -> nn/plan.py"]),
        ({"nn/plan.py": "from . import Stack\n"}, ["a circle: nn/__init__.py -> nn/plan.py -> nn/__init__.py"]),
        (
            {"nn/plan.py": "def f():\n    from .stack import x\n"},
            [
                "a circle: nn/plan.py -> nn/stack.py -> nn/plan.py",
                "nn/plan.py:2: muddformer.nn.stack is imported inside a function",
            ],
        ),
        (
            {"errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import muddformer.ops\n"},
            [],
        ),
        ({"ops.py": "if TYPE_CHECKING:\n    import muddformer.training.loop\n"}, ["ops.py uses training/loop.py, but"]),
        ({"ops.py": "def f():\n    import rich\n"}, ["ops.py:2: rich is imported inside a function"]),
        ({"models/model.py": "from muddformer import utils_of_it\n"}, ["models/model.py uses __init__.py, but cli"]),
        ({"plots.py": "from . import ops\n"}, ["plots.py uses ops.py, but may use plots, errors alone"]),
        ({"cli/hub.py": "from ..hf.model import x\n", "hf/model.py": ""}, ["cli/hub.py uses hf/model.py, but hf,"]),
        ({"cellar/x.py": ""}, ["cellar/x.py is on no floor"]),
    ],
)  # fmt: skip
def test_faults_of_a_package(tmp_path: Path, files: dict[str, str], expected: list[str]) -> None:
    found = python_complaints(write(tmp_path / "muddformer", {**SOUND, **files}))
    for words in expected:
        assert any(words in complaint for complaint in found), found
    assert bool(found) == bool(expected)


SOUND_CPP = {
    "macros.h": "#include <string>\n",
    "version.h.in": "",
    "muddformer.h": '#include "ops.h"\n#include "version.h"\n',
    "ops.h": '#include "ops/aggregate/aggregate.h"\n',
    "kernels/common/ring.cuh": "#include <cuda_runtime.h>\n",
    "kernels/aggregate/aggregate.cu": '#include "../common/ring.cuh"\n',
    "ops/common/checks.h": "#include <ATen/ATen.h>\n",
    "ops/aggregate/aggregate.h": '#include "../../macros.h"\n#include "../common/checks.h"\n',
    "nn/stack.h": '#include "ops/aggregate/aggregate.h"\n',
    "io/files.h": '#include "../ops/common/checks.h"\n',
    "models/config.h": '#include "../io/files.h"\n#include <muddformer/nn/stack.h>\n',
    "inference/generation.h": '#include "../models/config.h"\n',
    "python/module.cpp": '#include "version.h"\n#include "muddformer.h"\n',
}


def test_sound_sources(tmp_path: Path) -> None:
    assert cpp_complaints(write(tmp_path / "csrc", SOUND_CPP)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"nn/stack.h": '#pragma once\n#include "plan.h"\n', "nn/plan.h": '#include "stack.h"\n'},
            ["a circle: nn/plan.h -> nn/stack.h -> nn/plan.h (csrc/nn/plan.h:1, csrc/nn/stack.h:2)"],
        ),
        (
            {"nn/stack.h": '#include "../models/config.h"\n'},
            [
                "a circle: models/config.h -> nn/stack.h -> models/config.h",
                "csrc/nn/stack.h:1: nn/stack.h uses models/config.h, but models is above nn",
            ],
        ),
        ({"ops/aggregate/cpu.cpp": "#include <muddformer/nn/stack.h>\n"}, ["ops/aggregate/cpu.cpp uses nn/stack.h"]),
        ({"models/config.cpp": '#include "../muddformer.h"\n'}, ["models/config.cpp uses muddformer.h, but ops.h"]),
        ({"kernels/common/x.h": '#include "ops/common/checks.h"\n'}, ["kernels/common/x.h uses ops/common/checks.h"]),
        ({"kernels/common/x.h": "#include <c10/util/Half.h>\n"}, ["kernels/common/x.h includes c10/util/Half.h, but"]),
        ({"io/files.cpp": '#include "../nn/stack.h"\n'}, ["io/files.cpp uses nn/stack.h, but may use io, ops/common"]),
        ({"nn/stack.cpp": '#include "stak.h"\n'}, ["csrc/nn/stack.cpp:1: stak.h is not in csrc"]),
    ],
)  # fmt: skip
def test_faults_of_sources(tmp_path: Path, files: dict[str, str], expected: list[str]) -> None:
    found = cpp_complaints(write(tmp_path / "csrc", {**SOUND_CPP, **files}))
    assert len(found) == len(expected)
    for words in expected:
        assert any(words in complaint for complaint in found), found


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    sys.exit("\n".join([*python_complaints(root / "muddformer"), *cpp_complaints(root / "csrc")]) or None)
