"""Checkpoint directories from one layout to another, tensor by tensor.

The new directory is made beside its place under the name ``DST.partial`` and takes its own name when it is complete.
There each finished shard is kept: the same conversion, called again, goes on after the last of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from .._checks import check_keys
from .._files import FileLock, read_json, sync, write_atomically
from ..nn import ConnectionOptions, Connections
from . import release
from .checkpoint import CONFIG_NAME, WEIGHTS_NAME, check_tensors, find_weights, listed_tensors, read_config
from .config import MUDDFormerConfig
from .families import FAMILIES, load_config
from .foreign import FOREIGN, Foreign
from .muddformer import MUDDFormer
from .stored import DTYPE_NAMES, StoredTensor, open_tensors
from .writing import write_tensors

__all__ = ["LAYOUTS", "convert", "read_source_config"]

LAYOUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "muddformer": lambda config: config.to_dict(),
    "hf": lambda config: release.keys_of(config.to_dict()),
}
"""What is written as ``config.json``, by the name of the layout. Names of tensors are the release's in all of them."""
_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_STATE = "conversion.json"
_LOCK = "conversion.lock"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str = "muddformer",
    connections: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Makes a checkpoint directory of another one, without ever holding more than a tensor of it.

    Args:
        source: a directory of ours, of the public release, of the Hugging Face layout, or of transformers' GPT-NeoX or
            Llama; safetensors or pickles, whole or in shards.
        target: the directory to make. It must not be there.
        layout: a key of :data:`LAYOUTS`: ``"muddformer"``, or ``"hf"``, which transformers reads after
            ``import muddformer.hf``.
        connections: fields of the connections that a model without any is given (an empty mapping: the defaults). They
            are fresh, so it computes what it computed before. None: no change.
        dtype: of all tensors that are written. None: as they are stored.
        max_shard_bytes: a larger checkpoint is split; each shard is at most so large, unless one tensor is.
        seed: of the fresh connections.
        progress: called with the bytes that were written and those of the whole.

    Returns:
        The configuration of what was written.

    Raises:
        FileNotFoundError: if a file of the source is missing.
        FileExistsError: if the target, or another conversion to it, is there.
        BlockingIOError: if another process is making it.
        OSError: if it cannot be written.
        TypeError, ValueError: naming what is wrong with the source or an argument.
    """
    source, target = Path(source), Path(target)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}, got {dtype}")
    if target.is_symlink() or target.name in ("", ".."):
        target = target.resolve()
    ended = (target / _STATE).is_file()  # but for the removal of this file
    if target.exists() and not ended and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: give a directory that is not")
    with ExitStack() as stack:
        files = stack.enter_context(_Files(source))
        config = read_source_config(source)
        tensors = _read_tensors(source, config, files)
        if connections is not None:
            config = _with_connections(source, config, connections)
        tensors = _fit(source, files.index, config, tensors, None if connections is None else seed)
        if dtype is not None:
            tensors = {name: tensor._replace(dtype=DTYPE_NAMES[dtype]) for name, tensor in tensors.items()}
        settings = LAYOUTS[layout](config)
        plan = {"source": files.facts(), "config": settings, "dtype": str(dtype), "seed": seed, "most": max_shard_bytes}
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        if not ended:
            _write(source, target, _shards(tensors, max_shard_bytes), settings, digest, progress)
        elif read_json(target / _STATE).get("plan") != digest:
            raise FileExistsError(f"{target} is of another conversion: give a directory that is not there")
        for name in (_LOCK, _STATE):
            (target / name).unlink(missing_ok=True)
    return config


class _Files:
    """The files with a checkpoint's tensors, of which one is open at a time: mapped pages count as memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: tuple[str, dict[str, StoredTensor]] = ("", {})
        self._stack = ExitStack()

    def __enter__(self) -> _Files:
        self.index, self._files = find_weights(self.directory)
        return self

    def __exit__(self, *_: object) -> None:
        self._open = ("", {})
        self._stack.close()

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors; their files are opened again when they are read."""
        found = {}
        for file, names in self._files.items():
            for name, tensor in listed_tensors(self.index, file, names, self._tensors_of(file)).items():
                found[name] = tensor._replace(read=lambda file=file, name=name: self._tensors_of(file)[name].read())
        return found

    def facts(self) -> list[list[Any]]:
        """What another conversion of the same files has in common with this one."""
        stats = [(file, (self.directory / file).stat()) for file in self._files]
        return [[str(self.directory.resolve()), file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def _tensors_of(self, file: str) -> dict[str, StoredTensor]:
        if self._open[0] != file:
            self.__exit__()
            self._open = (file, self._stack.enter_context(open_tensors(self.directory / file)))
        return self._open[1]


def read_source_config(directory: Path) -> Any:
    """The configuration that a directory's ``config.json`` stands for, whichever layout it has.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is of an architecture, or has a part, that is not expressible here.
    """
    values = read_config(directory)
    foreign = _foreign(values)
    if foreign is None:
        kind = values.get("model_type")
        if not (kind is None or (isinstance(kind, str) and kind in FAMILIES)):
            known = ", ".join([*FAMILIES, *FOREIGN])
            raise ValueError(f"{directory / CONFIG_NAME}: model_type must be one of {known}, got {kind!r}")
        return load_config(directory)
    try:
        return MUDDFormerConfig(**foreign.fields(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG_NAME}: {error}") from error


def _foreign(values: Mapping[str, Any]) -> Foreign | None:
    kind = values.get("model_type")
    return FOREIGN.get(kind) if isinstance(kind, str) else None


def _read_tensors(source: Path, config: Any, files: _Files) -> dict[str, StoredTensor]:
    """The tensors by our names."""
    foreign = _foreign(read_config(source))
    if foreign is None:
        return files.tensors()
    try:
        return foreign.rename(files.tensors(), config)
    except RuntimeError as error:  # a fused matrix of another shape
        raise ValueError(f"{files.index}: a tensor does not have the shape of {CONFIG_NAME}: {error}") from error


def _with_connections(source: Path, config: Any, fields: Mapping[str, Any]) -> MUDDFormerConfig:
    if not isinstance(config, MUDDFormerConfig) or config.dense:
        raise ValueError(f"{source}: only a model without connections can be given some, and this one has them")
    # gelu_approximate is the feed-forward networks' too: it stays.
    known = {field.name for field in dataclasses.fields(ConnectionOptions)} - {"dense", "gelu_approximate"}
    check_keys(fields, known | {"separate_norms"}, "the connections that a model can be given")
    config = config.replace(**fields, dense=True)
    config.check_keeps_outputs()
    return config


def _fit(
    source: Path, index: Path, config: Any, tensors: dict[str, StoredTensor], seed: int | None
) -> dict[str, StoredTensor]:
    """The tensors of a model of this configuration, checked; with fresh connections if there is a seed for them."""
    model_class = FAMILIES[config.model_type].model
    model_class._check_count(index, config, len(tensors))
    model = model_class.skeleton(config, source / CONFIG_NAME)
    expected = model._stored_shapes(tensors)
    if seed is not None:
        tensors = _split_norms(tensors, expected)
        tensors.update(_fresh_connections(model, seed, next(iter(tensors.values())).dtype))
    check_tensors(index, expected, tensors)
    if "output.weight" in tensors and getattr(config, "tie_word_embeddings", False):
        both = {name: tensors[name].read() for name in ("tok_embeddings.weight", "output.weight")}
        model._check_stored(index, both)
        del tensors["output.weight"]
    return tensors


def _split_norms(tensors: Mapping[str, StoredTensor], expected: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """A norm of a block that has one for each of its streams now is copied for each."""
    split = {}
    for name, tensor in tensors.items():
        separate = [name.replace(".attention_norm.", f".attention_norms.{way}.") for way in range(3)]
        split.update(dict.fromkeys([name] if name in expected or separate[0] not in expected else separate, tensor))
    return split


def _fresh_connections(model: MUDDFormer, seed: int, dtype: str) -> dict[str, StoredTensor]:
    for module in (model.dense_bs, model.dynamic_dense, model.source_norms):
        module.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Connections.reset_parameters(model)
    values = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    return {name: StoredTensor(list(value.shape), dtype, lambda value=value: value) for name, value in values.items()}


def _shards(tensors: Mapping[str, StoredTensor], most: int) -> dict[str, dict[str, StoredTensor]]:
    """The tensors by the files that they go into, in the order in which they are stored."""
    shards: list[dict[str, StoredTensor]] = [{}]
    size = 0  # of the last one
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if shards[-1] and size > most:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    stem, _, suffix = WEIGHTS_NAME.partition(".")
    return {f"{stem}-{i:05}-of-{len(shards):05}.{suffix}": shard for i, shard in enumerate(shards, 1)}


def _size(shard: Mapping[str, StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def _write(
    source: Path,
    target: Path,
    shards: Mapping[str, Mapping[str, StoredTensor]],
    settings: Mapping[str, Any],
    digest: str,
    progress: Callable[[int, int], None],
) -> None:
    staging = target.with_name(f"{target.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(staging / _LOCK)
    except BlockingIOError as error:
        raise BlockingIOError(f"{staging}: {error} is making it") from error
    try:
        _claim(staging, digest)
        left = sum(_size(shard) for file, shard in shards.items() if not (staging / file).exists())
        if shutil.disk_usage(staging).free < left:
            raise OSError(f"{staging}: {left / 1e9:.1f} GB are needed, more than the disk has left")
        _write_shards(staging, shards, progress)
        for name in _CARRIED:
            if (source / name).is_file():
                write_atomically(staging / name, lambda path, name=name: shutil.copyfile(source / name, path))
        _write_json(staging / CONFIG_NAME, settings)
        os.rename(staging, target)
        sync(target.parent)
    finally:
        lock.release()


def _claim(staging: Path, digest: str) -> None:
    """Makes sure that what is in the folder is of this conversion, and removes the file that it was interrupted in."""
    for path in staging.glob(f".{_STATE}.*.tmp"):  # at its very beginning
        path.unlink()
    if (staging / _STATE).exists():
        if read_json(staging / _STATE).get("plan") != digest:
            raise FileExistsError(f"{staging} is of another conversion: remove it, or repeat that one")
        for path in staging.glob(".*.tmp"):
            path.unlink()
    elif set(os.listdir(staging)) - {_LOCK}:
        raise FileExistsError(f"{staging} is there already and is no conversion")
    else:
        _write_json(staging / _STATE, {"plan": digest})


def _write_shards(
    staging: Path, shards: Mapping[str, Mapping[str, StoredTensor]], progress: Callable[[int, int], None]
) -> None:
    total, done = sum(map(_size, shards.values())), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for file, shard in shards.items():
        if (staging / file).exists():
            advance(_size(shard))
        else:
            write_tensors(staging / file, shard, advance)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        _write_json(
            staging / f"{WEIGHTS_NAME}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda path: path.write_text(text, encoding="utf-8"))
