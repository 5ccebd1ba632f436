"""Models from settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError
from ..models import Pretrained, build_model, family_of
from .settings import suggest

__all__ = ["make_config", "make_model"]


def make_config(fields: Mapping[str, Any], vocab_size: int) -> Any:
    """The configuration of section ``model``.

    Args:
        fields: the section; its ``vocab_size`` may be larger than the tokenizer's, say for the hardware's sake.
        vocab_size: number of tokens of the tokenizer, the default.

    Raises:
        InputError: naming the bad field.
    """
    config_class = family_of(fields).config
    known = [f"model.{field.name}" for field in dataclasses.fields(config_class)]
    for name in fields:
        if f"model.{name}" not in known:
            raise InputError(f"unknown key 'model.{name}'{suggest(f'model.{name}', known)}")
    try:
        config = config_class(**{"vocab_size": vocab_size, **fields})
    except (TypeError, ValueError) as error:
        raise InputError(f"section 'model': {error}") from error
    if config.vocab_size < vocab_size:
        raise InputError(f"model.vocab_size must be at least the tokenizer's {vocab_size}, got {config.vocab_size}")
    return config


def make_model(fields: Mapping[str, Any], vocab_size: int, seed: int | None = None) -> Pretrained:
    """A fresh model of :func:`make_config`. From equal seeds a model and its plain twin start with equal blocks."""
    model = build_model(make_config(fields, vocab_size))
    if seed is not None:
        torch.manual_seed(seed)  # making the modules drew numbers too, more of them with connections
        model.reset_parameters()
    return model
