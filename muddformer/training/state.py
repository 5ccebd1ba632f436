"""Checkpoints of a run: what it needs to continue bit for bit.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors``, ``config.json`` and ``tokenizer.json`` (all that
generation needs), ``training.safetensors`` (optimizer and random number generators) and ``training.json`` (step,
settings, checksums of the token ids). The folder appears under its name only when everything in it is on the disk.
Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._files import sync
from ..errors import InputError
from ..inference.loading import CHECKPOINT_PREFIX, find_checkpoints

__all__ = ["Checkpoint", "restore_state", "save_checkpoint"]

_FORMAT = 1
_SCRATCH = (".tmp-", ".old-")


def save_checkpoint(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer_json: str,
    training: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Writes a checkpoint atomically and removes all but the newest ``keep_last``.

    Args:
        run: folder of the run.
        model: with ``save_pretrained(folder)``.
        optimizer: of the model's parameters.
        tokenizer_json: text of ``tokenizer.json``.
        training: plain data with the keys that :class:`Checkpoint` asks for; ``step`` names the folder.
        keep_last: checkpoints that stay.

    Returns:
        The folder.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.iterdir():  # of a run that was killed
        if left_over.name.startswith(_SCRATCH):
            shutil.rmtree(left_over)
    target = folder / f"{CHECKPOINT_PREFIX}{training['step']:08}"
    scratch = folder / f".tmp-{target.name}"
    scratch.mkdir()
    model.save_pretrained(scratch)
    (scratch / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    save_file(_state_tensors(model, optimizer), scratch / "training.safetensors")
    contents = json.dumps({"format": _FORMAT, **training}, indent=1)
    (scratch / "training.json").write_text(contents, encoding="utf-8")
    for path in (*scratch.iterdir(), scratch):
        sync(path)
    if target.exists():  # a resumed run comes by the same step
        _discard(target)
    scratch.rename(target)
    sync(folder)
    for old in find_checkpoints(run)[:-keep_last]:
        _discard(old)
    return target


class Checkpoint:
    """The training state of a checkpoint folder.

    Attributes:
        folder: the checkpoint.
        training: contents of ``training.json``.

    Raises:
        InputError: if a file is missing, truncated or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            self.tensors = load_file(folder / "training.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"cannot read checkpoint {str(folder)!r}: {error}") from error
        if not isinstance(self.training, dict) or self.training.get("format") != _FORMAT:
            raise InputError(f"checkpoint {str(folder)!r} is not of format {_FORMAT}")
        if missing := {"step", "sequences", "settings", "corpus", "threads", "torch"} - self.training.keys():
            raise InputError(f"checkpoint {str(folder)!r} lacks {', '.join(sorted(missing))} in training.json")


def restore_state(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimizer of ``model`` and torch's random number generators into the checkpoint's state.

    Raises:
        InputError: if the state is not one of this model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(order))}
    index_of = {name: index for index, name in enumerate(order)}
    try:
        for key, tensor in checkpoint.tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                name, _, entry = rest.partition("/")
                state[index_of[name]][entry] = tensor.clone()  # else a view of the mapped file
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(checkpoint.tensors["rng/cpu"])
        if "rng/cuda" in checkpoint.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint.tensors["rng/cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint {str(checkpoint.folder)!r} does not fit the model: {error}") from error


def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for entry, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{entry}"] = tensor.detach().contiguous()
    return tensors


def _discard(folder: Path) -> None:
    """Removes a checkpoint such that no half of it is ever found under its name."""
    grave = folder.with_name(f".old-{folder.name}")
    folder.rename(grave)
    shutil.rmtree(grave)
