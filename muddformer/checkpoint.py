"""Checkpoints: a directory with ``model.safetensors`` (or shards and their index) and ``config.json``.

Nothing is pickled, nothing is fetched. Files are not trusted: everything they claim is checked before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from .config import MUDDFormerConfig
from .models import MUDDFormer, build_model

__all__ = ["from_pretrained", "load_config", "save_pretrained"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {"F64", "F32", "F16", "BF16"}
_LARGEST_CONFIG = 2**20
_LARGEST_INDEX = 2**26


def save_pretrained(model: MUDDFormer, directory: str | os.PathLike[str]) -> None:
    """Writes a model's weights (``model.safetensors``) and configuration (``config.json``) into a directory.

    The directory is made if it is not there. Each file appears under its name only when all of it is on the disk, so an
    interrupted save leaves the old file. A model that is sharded over processes (FSDP2) is gathered: all of them call
    this, the first one writes.

    Raises:
        TypeError: if ``model`` is no MUDDFormer.
        ValueError: if its parameters are on the meta device.
        OSError: if the directory cannot be written.
    """
    if not isinstance(model, MUDDFormer):
        raise TypeError(f"model must be a MUDDFormer, got {type(model).__name__}")
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        raise ValueError("model must have values to save, but its parameters are on the meta device")
    sharded = any(isinstance(value, DTensor) for value in state.values())
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        state[name] = whole.detach().cpu().contiguous()
    if not sharded or torch.distributed.get_rank() == 0:
        _write_checkpoint(model, state, Path(directory))
    if sharded:
        torch.distributed.barrier()  # whoever reads it next finds it there


def _write_checkpoint(model: MUDDFormer, state: dict[str, torch.Tensor], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    _write(directory / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _write(directory / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def from_pretrained(
    directory: str | os.PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None
) -> MUDDFormer:
    """The model of a checkpoint directory: one of :func:`save_pretrained`, or of the public release as safetensors.

    Args:
        directory: holds ``config.json`` with the fields of :class:`muddformer.MUDDFormerConfig` or the public
            release's keys, and ``model.safetensors`` or ``model.safetensors.index.json`` with the shards that it names.
        device: where the parameters are put. None: the CPU.
        dtype: of the parameters. None: as they are stored.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError: for a wrong ``dtype``.
        ValueError: naming the file and what is wrong with it.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    directory = Path(directory)
    config = load_config(directory)
    with _open_weights(directory) as (path, tensors):
        if len(tensors) <= config.n_layer:  # before anything is built: a hostile n_layer must not take long
            raise ValueError(f"{path}: {len(tensors)} tensors are too few for n_layer={config.n_layer}")
        try:
            model = build_model(config, device="meta")
        except RuntimeError as error:  # sizes whose product overflows
            raise ValueError(f"{directory / CONFIG_NAME}: no model has these sizes: {error}") from error
        _check_tensors(path, model, tensors)
        # A copy: what safetensors returns may be a view of the mapped file.
        state = {name: file.get_tensor(name).to(device or "cpu", dtype, copy=True) for name, file in tensors.items()}
    head = state.get("output.weight")
    if config.tie_word_embeddings and head is not None:
        if not torch.equal(head, state["tok_embeddings.weight"]):
            raise ValueError(
                f"{path}: output.weight differs from tok_embeddings.weight, but tie_word_embeddings is set"
            )
        del state["output.weight"]
    model.load_state_dict(state, assign=True)
    return model


def load_config(directory: str | os.PathLike[str]) -> MUDDFormerConfig:
    """The configuration in a checkpoint directory, with our field names or the public release's keys.

    Raises:
        FileNotFoundError: if there is no ``config.json``.
        ValueError: naming the file and what is wrong with it.
    """
    path = Path(directory) / CONFIG_NAME
    values = _read_json(path, _LARGEST_CONFIG)
    try:
        read = MUDDFormerConfig.from_official if MUDDFormerConfig.is_official(values) else MUDDFormerConfig.from_dict
        return read(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def _open_weights(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file that lists the tensors, and the open safetensors file of every tensor."""
    index = directory / INDEX_NAME
    single = not index.exists() or (directory / WEIGHTS_NAME).exists()
    with ExitStack() as stack:
        if single:
            file = stack.enter_context(_open(directory / WEIGHTS_NAME))
            yield directory / WEIGHTS_NAME, dict.fromkeys(file.keys(), file)
            return
        files: dict[str, Any] = {}
        tensors = {}
        for name, shard in _shards(index).items():
            if shard not in files:
                files[shard] = stack.enter_context(_open(directory / shard))
            if name not in files[shard].keys():  # noqa: SIM118  (a safetensors file is no mapping)
                raise ValueError(f"{index}: {name} is said to be in {shard}, which does not have it")
            tensors[name] = files[shard]
        yield index, tensors


def _shards(index: Path) -> dict[str, str]:
    """The checked ``weight_map`` of an index: tensor names to file names in the index's own directory."""
    shards = _read_json(index, _LARGEST_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: no weight_map of tensor names to file names")
    for shard in shards.values():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & {"/", "\\", ":", "\0"}
        if not plain:
            raise ValueError(f"{index}: weight_map must name .safetensors files beside it, got {shard!r}")
    return shards


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file whose header the library has checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
    with file:
        yield file


def _check_tensors(path: Path, model: MUDDFormer, tensors: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes, from the headers alone."""
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings and "output.weight" in tensors:
        expected["output.weight"] = expected["tok_embeddings.weight"]
    for problem, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{path}: {len(names)} {problem} tensor(s) for this configuration: {listed}")
    for name, shape in expected.items():
        entry = tensors[name].get_slice(name)
        if list(entry.get_shape()) != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}, got {list(entry.get_shape())}")
        if entry.get_dtype() not in _DTYPES:
            raise ValueError(f"{path}: {name} must be of one of {', '.join(sorted(_DTYPES))}, got {entry.get_dtype()}")


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many, at most {limit} are read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets ``write`` fill a file beside ``path`` and then gives it that name, durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
