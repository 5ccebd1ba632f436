"""Waiting for modules that take too long to import here, and that most programs do without."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]


def when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls a function with a module: at once if it has been imported, else as soon as somebody does."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, function))


class _Waiting(MetaPathFinder):
    """Finds nothing itself, but sees what is imported."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self.function, self.looking = name, function, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name or self.looking:
            return None
        self.looking = True  # the others are asked, through here too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # who only asks where a module is does not import it
                    sys.meta_path.remove(self)
                    self.function(module)

            spec.loader.exec_module = exec_module
        return spec
