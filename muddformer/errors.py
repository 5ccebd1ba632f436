"""Errors that the command line turns into one line and an exit code, and the import of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["Diverged", "InputError", "MissingPackage", "require"]


class InputError(ValueError):
    """Something given by the user (a value, a key, a file) cannot be used. The message names it. Exit code 2."""


class MissingPackage(InputError):
    """An optional package is not installed. The message says how to install it. Exit code 2."""


class Diverged(RuntimeError):
    """The loss or the gradient norm became NaN or infinite, or no gradient is left. The last good checkpoint is kept.

    Exit code 1.
    """


def require(module: str, extra: str = "train") -> ModuleType:
    """Imports an optional module, which ``pip install "muddformer[EXTRA]"`` brings.

    Raises:
        MissingPackage: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f'{package} is needed here and cannot be imported ({error}): pip install "muddformer[{extra}]"'
        raise MissingPackage(message) from error
