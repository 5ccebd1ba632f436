"""Small models of every variant in tests/variants.json, which the C++ tests read too."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from helpers.paths import TESTS
from muddformer import MUDDFormer, MUDDFormerConfig, build_model

_FILE = json.loads((TESTS / "variants.json").read_text(encoding="utf-8"))
SMALL: dict[str, Any] = _FILE["small"]  # fields of the configuration that all have
VARIANTS: dict[str, dict[str, Any]] = _FILE["variants"]  # fields that each has besides, by its name

Module = TypeVar("Module", bound=nn.Module)


def make(variant: str = "default", **changes: Any) -> MUDDFormer:
    return build_model(MUDDFormerConfig(**{**SMALL, **VARIANTS[variant], **changes}))


def scramble(module: Module, alpha: float = 0.2) -> Module:
    """Moves every parameter off its initial value, so that each one counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=alpha)
    return module


def some_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length))
