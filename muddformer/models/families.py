"""The families of models: which class a configuration, or a checkpoint directory, belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checkpoint import CONFIG_NAME, read_config
from .config import FAMILY_DEFAULTS, MUDDFormerConfig
from .foreign import FOREIGN
from .muddformer import MUDDFormer
from .pretrained import Pretrained, not_a_model

__all__ = ["FAMILIES", "Family", "build_model", "family_of", "from_pretrained", "load_config", "save_pretrained"]


class Family(NamedTuple):
    """The classes of a family.

    Attributes:
        config: of its configurations.
        model: of its models.
    """

    config: type[Any]
    model: type[Pretrained]


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(FAMILY_DEFAULTS, Family(MUDDFormerConfig, MUDDFormer)),
}
"""By ``model_type``, a field of every configuration and a key of its ``to_dict()``. One's own is one line more."""


def family_of(values: Mapping[str, Any]) -> Family:
    """The family that a configuration names; for any other that of MUDDFormerConfig, which says what is wrong."""
    name = values.get("model_type")
    return FAMILIES[name if isinstance(name, str) and name in FAMILIES else "muddformer"]


def build_model(config: Any, device: Any = None, dtype: torch.dtype | None = None) -> Pretrained:
    """A freshly initialised model.

    Args:
        config: what the model computes, a :class:`muddformer.MUDDFormerConfig` or a configuration of another family;
            with ``dense=False`` it is the plain Transformer.
        device: where its parameters are made; ``"meta"`` makes none.
        dtype: of the parameters: float64, float32, bfloat16 or float16. None: torch's default.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or not isinstance(config, family.config):
        expected = " or ".join(sorted({family.config.__name__ for family in FAMILIES.values()}))
        raise TypeError(f"config must be a {expected}, got {type(config).__name__}")
    return family.model(config, device=device, dtype=dtype)


def save_pretrained(model: Pretrained, directory: str | os.PathLike[str]) -> None:
    """Writes a model's weights and configuration into a directory, see :meth:`MUDDFormer.save_pretrained`.

    Raises:
        TypeError: if ``model`` is of no family.
        ValueError: if its parameters are on the meta device, or its parts are not those of its configuration (adapters,
            quantised layers, one device's part).
        OSError: if the directory cannot be written.
    """
    if not isinstance(model, Pretrained):
        raise not_a_model(model)
    model.save_pretrained(directory)


def from_pretrained(
    directory: str | os.PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None
) -> Pretrained:
    """The model of a checkpoint directory: one of :func:`save_pretrained`, or of the public release.

    Args:
        directory: holds ``config.json`` with the fields of :class:`muddformer.MUDDFormerConfig` or the public
            release's keys, and ``model.safetensors`` or ``model.safetensors.index.json`` with the shards that it names,
            or else ``pytorch_model.bin`` or its index and shards: a pickle with more than tensors is refused unread.
        device: where the parameters are put. None: the CPU.
        dtype: of the parameters. None: as they are stored.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError: for a wrong ``dtype``.
        ValueError: naming the file and what is wrong with it.
        RuntimeError: PyTorch's, for a device that is not there.
    """
    values = read_config(Path(directory))
    return _model_class(Path(directory), values)._load(Path(directory), values, device, dtype)


def load_config(directory: str | os.PathLike[str]) -> Any:
    """The configuration in a checkpoint directory, with our field names or the public release's keys.

    Raises:
        FileNotFoundError: if there is no ``config.json``.
        ValueError: naming the file and what is wrong with it.
    """
    values = read_config(Path(directory))
    return _model_class(Path(directory), values)._config_of(Path(directory), values)


def _model_class(directory: Path, values: Mapping[str, Any]) -> type[Pretrained]:
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in FOREIGN:
        raise ValueError(
            f"{directory / CONFIG_NAME}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}: "
            f"muddformer convert makes such a checkpoint of it"
        )
    return family_of(values).model
