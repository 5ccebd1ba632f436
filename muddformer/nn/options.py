"""The options of connections: their values and checks."""

from __future__ import annotations

from typing import Any

__all__ = ["GELU_FORMS", "POST_NORMS", "WAYS", "check_flush_interval", "check_ways"]

WAYS = "qkvr"
POST_NORMS = ("none", "residual", "all")
GELU_FORMS = ("none", "tanh")


def check_ways(name: str, ways: Any) -> str:
    """``ways`` in the order of ``"qkvr"``, after checking that it is a part of it, not empty, no letter twice."""
    if not isinstance(ways, str):
        raise TypeError(f"{name} must be a string, a part of {WAYS!r}, got {ways!r}")
    if not ways or set(ways) - set(WAYS) or len(set(ways)) != len(ways):
        raise ValueError(f"{name} must be a part of {WAYS!r}, not empty and no letter twice, got {ways!r}")
    return "".join(way for way in WAYS if way in ways)


def check_flush_interval(interval: int | None, window: int | None) -> None:
    """Refuses groups of aggregations that do not share their older hidden states."""
    if window is not None and interval not in (None, 1):
        raise ValueError(
            f"flush_interval must be None or 1 with a window, because the aggregations of a group have to share their "
            f"older hidden states, got flush_interval={interval} and window={window}"
        )
