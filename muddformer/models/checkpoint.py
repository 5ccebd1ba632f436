"""Files of a checkpoint: a directory with ``model.safetensors`` (or shards and their index) and ``config.json``.

Nothing is pickled, nothing is fetched. Files are not trusted: everything they claim is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import read_json, write_atomically

__all__ = ["CONFIG_NAME", "check_tensors", "open_weights", "read_config", "write_checkpoint"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {"F64", "F32", "F16", "BF16"}
_LARGEST_CONFIG = 2**20
_LARGEST_INDEX = 2**26


def write_checkpoint(directory: Path, state: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes tensors and configuration into a directory, which is made if it is not there.

    Raises:
        OSError: if the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_atomically(directory / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def read_config(directory: Path) -> dict[str, Any]:
    """The JSON object in ``config.json``.

    Raises:
        FileNotFoundError: if there is no such directory or file.
        ValueError: naming the file and what is wrong with it.
    """
    if not directory.exists():
        raise FileNotFoundError(
            f"{directory / CONFIG_NAME}: no such file, nor its directory. Nothing is fetched here: download a model "
            "first, for example with huggingface_hub.snapshot_download, and give its directory"
        )
    return read_json(directory / CONFIG_NAME, _LARGEST_CONFIG)


@contextmanager
def open_weights(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file that lists the tensors of a checkpoint directory, and the open safetensors file of every tensor."""
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
    shards = read_json(index, _LARGEST_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: no weight_map of tensor names to file names")
    for shard in shards.values():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & {"/", "\\", ":", "\0"}
        if not plain:
            raise ValueError(f"{index}: weight_map must name .safetensors files beside it, got {shard!r}")
    return shards


def check_tensors(path: Path, expected: Mapping[str, list[int]], tensors: Mapping[str, Any]) -> None:
    """Checks names, shapes and dtypes, from the headers alone.

    Args:
        path: the file that lists the tensors, for messages.
        expected: shapes by name.
        tensors: what :func:`open_weights` gives.

    Raises:
        ValueError: naming the file and the first tensors that are missing, unknown or wrong.
    """
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
