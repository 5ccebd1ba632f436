"""Checks of values. An error names the value, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["check_choice", "check_flag", "check_integer", "check_keys", "check_real", "shown", "shown_name"]


def shown(value: Any, limit: int = 100) -> str:
    """A value as an error shows it: an error by its message, anything else by its repr, but not much of it."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def shown_name(name: str) -> str:
    """A name out of a file as an error shows it."""
    return name if len(name) <= 100 else f"{name[:100]}..."


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value``, after checking that it is one of the words ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {choices}, got {shown(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {shown(value)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """``value``, after checking that it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_integer(name: str, value: Any, high: int = 2**31 - 1, *, low: int = 1) -> int:
    """``value`` as an int, after checking that it is an integer (a bool is not) from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {shown(value)}")
    return int(value)


def check_real(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """``value`` as a float, after checking that it is finite, more than ``low`` and at most ``high``, and no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not (math.isfinite(number) and low < number <= high):
        bound = "finite" if high == math.inf else f"at most {high:g}"
        raise ValueError(f"{name} must be more than {low:g} and {bound}, got {shown(value)}")
    return number


def check_keys(values: Any, known: Collection[str], owner: str) -> None:
    """Refuses anything but a mapping whose keys are all ``known`` to their ``owner``."""
    if not isinstance(values, Mapping):
        raise TypeError(f"the configuration must be a mapping of names to values, got {type(values).__name__}")
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"unknown key {', '.join(map(shown, unknown[:5]))}: not a field of {owner}")
