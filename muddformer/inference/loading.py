"""Models from checkpoints and runs, and the device that they run on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..models import Pretrained, from_pretrained
from ..models.checkpoint import NOT_FETCHED
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "check_vocabulary",
    "checkpoint_name",
    "find_checkpoints",
    "find_device",
    "load_model",
    "load_model_and_tokenizer",
    "resolve_checkpoint",
]

_NAME = re.compile(r"step-\d{8,}")


def load_model(folder: Path) -> Pretrained:
    """The model of a checkpoint folder, on the CPU.

    Raises:
        InputError: if the folder holds none, or a broken one.
    """
    try:
        return from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"cannot load a model from {str(folder)!r}: {error}") from error


def load_model_and_tokenizer(
    folder: Path, device: str, dtype: torch.dtype | None = None
) -> tuple[Pretrained, Tokenizer]:
    """The model of a checkpoint folder, in eval mode, and its tokenizer.

    Args:
        device: see :func:`find_device`.
        dtype: of the parameters. None: as they are stored.

    Raises:
        InputError: if one of them is missing or broken, or they do not belong together; for an unknown device.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = load_model(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    return model.to(find_device(device), dtype).eval(), tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    """Refuses a tokenizer of a checkpoint folder that makes ids which its model does not have.

    Raises:
        InputError: naming both sizes.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"{str(folder / 'tokenizer.json')!r} has token ids up to {largest}, but the model's vocab_size is "
            f"{vocab_size}: they do not belong together"
        )


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


def checkpoint_name(step: int) -> str:
    """Name of the folder of a training run's checkpoint after so many steps."""
    return f"step-{step:08}"


def find_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a training run, oldest first.

    Folders with other names, such as a copy that a user made, and empty ones are none of ours.
    """
    folders = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in folders if any(path.iterdir())), key=lambda path: int(path.name[5:]))


def resolve_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, the newest checkpoint if it is the folder of a run.

    Raises:
        InputError: if it is neither.
    """
    if (folder / "config.json").is_file():
        return folder
    if not folder.exists():
        raise InputError(f"{str(folder)!r} does not exist. {NOT_FETCHED}")
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        raise InputError(f"{str(folder)!r} is neither a checkpoint nor a run with one")
    return checkpoints[-1]
