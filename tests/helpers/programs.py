"""Programs of benchmarks/, which import each other by their bare names, as modules."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@contextlib.contextmanager
def programs(folder: Path, *names: str) -> Iterator[SimpleNamespace]:
    """The modules of a folder by their names; afterwards they are gone, since other folders have the same names."""
    path = sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if (file := getattr(module, "__file__", None)) and Path(file).is_relative_to(BENCHMARKS):
                del sys.modules[name]
