"""Files of a checkpoint: a directory with ``model.safetensors`` (or shards and their index) and ``config.json``.

``pytorch_model.bin``, or its shards and index, is read where there is no safetensors file. Nothing is pickled by us,
nothing is fetched. Files are not trusted: everything they claim is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .._checks import shown, shown_name
from .._files import read_json, write_atomically
from .stored import DTYPES, StoredTensor, open_tensors

__all__ = [
    "CONFIG_NAME",
    "NOT_FETCHED",
    "WEIGHTS_NAME",
    "check_tensors",
    "find_weights",
    "listed_tensors",
    "open_weights",
    "read_config",
    "write_checkpoint",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"

NOT_FETCHED = (
    "Nothing is fetched here: download a model first, for example with huggingface_hub.snapshot_download, and give its "
    "directory"
)
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
        raise FileNotFoundError(f"{directory / CONFIG_NAME}: no such file, nor its directory. {NOT_FETCHED}")
    return read_json(directory / CONFIG_NAME, _LARGEST_CONFIG)


def find_weights(directory: Path) -> tuple[Path, dict[str, list[str] | None]]:
    """The file that lists the tensors of a checkpoint directory, and the files in it that have them.

    Returns:
        ``model.safetensors``, or the index of its shards, or else the same of ``pytorch_model.bin``; and by the name of
        each file with tensors the names that the index gives it, None without an index.

    Raises:
        ValueError: naming the index and what is wrong with it.
    """
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        index = directory / f"{name}.index.json"
        if not (directory / name).is_file() and index.is_file():
            return index, _shards(index, Path(name).suffix)
        if (directory / name).is_file():
            return directory / name, {name: None}
    return directory / WEIGHTS_NAME, {WEIGHTS_NAME: None}


@contextmanager
def open_weights(directory: Path) -> Iterator[tuple[Path, dict[str, StoredTensor]]]:
    """The file that lists the tensors of a checkpoint directory, and every tensor in its open file."""
    index, files = find_weights(directory)
    with ExitStack() as stack:
        tensors = {}
        for file, names in files.items():
            there = stack.enter_context(open_tensors(directory / file))
            tensors.update(listed_tensors(index, file, names, there))
        yield index, tensors


def listed_tensors(
    index: Path, file: str, names: list[str] | None, there: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Those tensors of a file that its index names, all of them without an index.

    Raises:
        ValueError: if the file lacks one.
    """
    for name in names or ():
        if name not in there:
            raise ValueError(f"{index}: {shown_name(name)} is said to be in {shown_name(file)}, which does not have it")
    return there if names is None else {name: there[name] for name in names}


def _shards(index: Path, suffix: str) -> dict[str, list[str] | None]:
    """The checked ``weight_map`` of an index, by file names in the index's own directory."""
    weight_map = read_json(index, _LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map of tensor names to file names")
    files: dict[str, list[str] | None] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(suffix) and not set(file) & {"/", "\\", ":", "\0"}
        if not plain:
            raise ValueError(f"{index}: weight_map must name {suffix} files beside it, got {shown(file)}")
        files.setdefault(file, []).append(name)
    return files


def check_tensors(path: Path, expected: Mapping[str, list[int]], tensors: Mapping[str, StoredTensor]) -> None:
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
            listed = ", ".join(map(shown_name, sorted(names)[:5])) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{path}: {len(names)} {problem} tensor(s) for this configuration: {listed}")
    for name, shape in expected.items():
        entry = tensors[name]
        if entry.shape != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}, got {entry.shape}")
        if entry.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} must be of one of {', '.join(sorted(DTYPES))}, got {entry.dtype}")
