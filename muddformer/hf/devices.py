"""Where models with connections may lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["check_device_map", "check_one_device"]


def check_one_device(name: str, devices: Iterable[Any]) -> None:
    """Refuses several devices.

    Args:
        name: of the argument.
        devices: of its parts.

    Raises:
        ValueError: naming the devices.
    """
    names = sorted({_name(device) for device in devices})
    if len(names) > 1:
        raise ValueError(
            f"{name} must have one device, because every block reads the hidden states of all blocks before it, got "
            f"{', '.join(names)}"
        )


def _name(device: Any) -> str:
    """The same for every way to say a device: 0, "cuda:0" and, as long as it is the current one, "cuda"."""
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError:  # "disk" and other places that transformers knows
        return str(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return str(found)


def check_device_map(device_map: Any) -> None:
    """Refuses a ``device_map`` of transformers, or what it was made to, with several devices.

    Raises:
        ValueError: naming the devices.
    """
    if isinstance(device_map, dict):
        check_one_device("device_map", device_map.values())
