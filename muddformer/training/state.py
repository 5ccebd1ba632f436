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

from .._files import read_json, remove, sync, write_atomically
from ..errors import InputError
from ..inference.loading import checkpoint_name, find_checkpoints

__all__ = ["Checkpoint", "remove_checkpoints", "restore_state", "save_checkpoint"]

_FORMAT = 1
# What training.json says, its type and the words for it.
_CONTENTS = {
    "step": (int, "an integer of at least 0"),
    "sequences": (int, "an integer of at least 0"),
    "settings": (dict, "a mapping"),
    "corpus": (dict, "a mapping"),
    "threads": (int, "an integer of at least 0"),
    "torch": (str, "a text"),
}
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

    Raises:
        OSError: naming the file that cannot be written. Nothing of the checkpoint is left, and the older ones stay.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_scratch(folder)  # of a run that was killed
    target = folder / checkpoint_name(training["step"])
    scratch = folder / f".tmp-{target.name}"
    scratch.mkdir()
    idle = [name for name, parameter in model.named_parameters() if not optimizer.state.get(parameter)]
    contents = json.dumps({"format": _FORMAT, **training, **({"without_state": idle} if idle else {})}, indent=1)
    tensors = _state_tensors(model, optimizer)
    try:
        model.save_pretrained(scratch)
        write_atomically(scratch / "tokenizer.json", lambda path: path.write_text(tokenizer_json, encoding="utf-8"))
        write_atomically(scratch / "training.safetensors", lambda path: save_file(tensors, path))
        write_atomically(scratch / "training.json", lambda path: path.write_text(contents, encoding="utf-8"))
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if target.exists():  # a resumed run comes by the same step
        _discard(target)
    scratch.rename(target)
    sync(folder)
    for old in [path for path in find_checkpoints(run) if _is_whole(path)][:-keep_last]:
        _discard(old)
    return target


def remove_checkpoints(run: Path) -> None:
    """Removes the checkpoints of a run, and what was left of one that was killed; what others put beside them stays.

    Raises:
        OSError: if one cannot be removed.
    """
    _remove_scratch(run / "checkpoints")
    for folder in find_checkpoints(run):
        _discard(folder)


def _remove_scratch(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.startswith(_SCRATCH):
            remove(path)


def _is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint that a run wrote under this name: no other is removed."""
    try:
        return checkpoint_name(read_json(folder / "training.json")["step"]) == folder.name
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Checkpoint:
    """The training state of a checkpoint folder.

    Attributes:
        folder: the checkpoint.
        training: contents of ``training.json``.
        tensors: contents of ``training.safetensors``.

    Raises:
        InputError: if a file is missing, truncated, of another format, or says what cannot be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.training = read_json(folder / "training.json")
            self.tensors = load_file(folder / "training.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"cannot read checkpoint {str(folder)!r}: {error}") from error
        if self.training.get("format") != _FORMAT:
            raise InputError(f"checkpoint {str(folder)!r} is not of format {_FORMAT}")
        if missing := _CONTENTS.keys() - self.training.keys():
            raise InputError(f"checkpoint {str(folder)!r} lacks {', '.join(sorted(missing))} in training.json")
        for name, (kind, words) in _CONTENTS.items():
            value = self.training[name]
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
                raise InputError(f"checkpoint {str(folder)!r}: {name} in training.json must be {words}, got {value!r}")
        idle = self.training.get("without_state", [])
        if not isinstance(idle, list) or not all(isinstance(name, str) for name in idle):
            raise InputError(f"checkpoint {str(folder)!r}: without_state in training.json must be a list of texts")
        if checkpoint_name(self.training["step"]) != folder.name:
            raise InputError(f"checkpoint {str(folder)!r} says that it is of step {self.training['step']}")


def restore_state(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the AdamW optimizer of ``model`` and torch's random number generators into the checkpoint's state.

    Everything is checked before anything is changed.

    Raises:
        InputError: if the state is not one of this model: other entries, shapes or dtypes, or values that no run has.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(model.named_parameters())
    idle = set(checkpoint.training.get("without_state", ()))
    expected = {"rng/cpu": torch.get_rng_state()}
    for name in order:
        if name not in idle:
            expected |= {f"optimizer/{name}/{entry}": parameters[name] for entry in ("exp_avg", "exp_avg_sq")}
            expected[f"optimizer/{name}/step"] = torch.zeros(())
    if "rng/cuda" in checkpoint.tensors:
        expected["rng/cuda"] = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    if problem := _difference(expected, checkpoint.tensors):
        raise InputError(f"training.safetensors of checkpoint {str(checkpoint.folder)!r} {problem}")
    steps = [int(checkpoint.tensors[f"optimizer/{name}/step"]) for name in order if name not in idle]
    if steps and max(steps) != checkpoint.training["step"]:
        raise InputError(
            f"training.safetensors of checkpoint {str(checkpoint.folder)!r} is of step {max(steps)}, "
            f"training.json of step {checkpoint.training['step']}"
        )
    state: dict[int, dict[str, Tensor]] = {index: {} for index, name in enumerate(order) if name not in idle}
    for index in state:
        for entry in ("step", "exp_avg", "exp_avg_sq"):  # copies: what was loaded may be a view of the mapped file
            state[index][entry] = checkpoint.tensors[f"optimizer/{order[index]}/{entry}"].clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(checkpoint.tensors["rng/cpu"])
    if expected.get("rng/cuda") is not None:
        torch.cuda.set_rng_state(checkpoint.tensors["rng/cuda"])


def _difference(expected: Mapping[str, Tensor | None], tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with tensors that should be like the expected ones, None standing for any; nothing if all fit."""
    for problem, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if keys:
            return f"does not fit the model: it {problem} {', '.join(sorted(keys)[:3])}" + (
                f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            )
    for name, like in expected.items():
        tensor = tensors[name]
        if like is None:
            continue
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            wanted, got = (f"{list(t.shape)} of {t.dtype}" for t in (like, tensor))
            return f"does not fit the model: {name} must be {wanted}, got {got}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"holds values of {name} that are not finite"
        if name.endswith(("/step", "/exp_avg_sq")) and (tensor < 0).any():
            return f"holds negative values of {name}"
    return ""


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
    remove(grave)
