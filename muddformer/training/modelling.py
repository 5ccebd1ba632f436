"""Models from settings and from checkpoints, and the device that they run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import from_pretrained
from ..config import MUDDFormerConfig
from ..models import MUDDFormer, build_model
from .errors import InputError
from .settings import suggest
from .state import find_checkpoints

__all__ = ["find_device", "load_model", "make_config", "make_model", "resolve_checkpoint"]


def make_config(fields: Mapping[str, Any], vocab_size: int) -> MUDDFormerConfig:
    """The configuration of section ``model``.

    Args:
        fields: the section; its ``vocab_size`` may be larger than the tokenizer's, say for the hardware's sake.
        vocab_size: number of tokens of the tokenizer, the default.

    Raises:
        InputError: naming the bad field.
    """
    known = [f"model.{field.name}" for field in dataclasses.fields(MUDDFormerConfig)]
    for name in fields:
        if f"model.{name}" not in known:
            raise InputError(f"unknown key 'model.{name}'{suggest(f'model.{name}', known)}")
    try:
        config = MUDDFormerConfig(**{"vocab_size": vocab_size, **fields})
    except (TypeError, ValueError) as error:
        raise InputError(f"section 'model': {error}") from error
    if config.vocab_size < vocab_size:
        raise InputError(f"model.vocab_size must be at least the tokenizer's {vocab_size}, got {config.vocab_size}")
    return config


def make_model(fields: Mapping[str, Any], vocab_size: int, seed: int | None = None) -> MUDDFormer:
    """A fresh model of :func:`make_config`. From equal seeds a model and its plain twin start with equal blocks."""
    model = build_model(make_config(fields, vocab_size))
    if seed is not None:
        torch.manual_seed(seed)  # making the modules drew numbers too, more of them with connections
        model.reset_parameters()
    return model


def load_model(folder: Path) -> MUDDFormer:
    """The model of a checkpoint folder, on the CPU.

    Raises:
        InputError: if the folder holds none, or a broken one.
    """
    try:
        return from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"cannot load a model from {str(folder)!r}: {error}") from error


def find_device(name: str) -> torch.device:
    """The device of this name; auto: CUDA if there is any, else the CPU.

    Raises:
        InputError: if torch has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, the newest checkpoint if it is the folder of a run.

    Raises:
        InputError: if it is neither.
    """
    if (folder / "config.json").is_file():
        return folder
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        raise InputError(f"{str(folder)!r} is neither a checkpoint nor a run with one")
    return checkpoints[-1]
