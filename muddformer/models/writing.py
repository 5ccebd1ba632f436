"""Safetensors files of tensors that are read one at a time, when it is their turn.

The library's own function needs all tensors of a file in memory.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import naming, write_atomically
from .stored import DTYPES, StoredTensor

__all__ = ["write_tensors"]

_BYTES_AT_ONCE = 2**22


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor], advance: Callable[[int], None]) -> None:
    """Writes a safetensors file, which appears under its name only when it is complete.

    Args:
        path: the file.
        tensors: what is written, of dtypes in :data:`DTYPES`, to which their values are cast.
        advance: called with the number of bytes that were written, now and then.

    Raises:
        OSError: if it cannot be written.
        ValueError: naming a tensor that has a value beyond the range of its dtype.
    """
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with _TensorFile(temporary, advance) as file:
            file.append(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.append_tensor(name, tensors[name])

    write_atomically(path, write)


class _TensorFile:
    """A file that tensors are appended to."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._stack = ExitStack()
        self._file = self._stack.enter_context(path.open("wb", buffering=0))
        self._sources: dict[str, int] = {}

    def __enter__(self) -> _TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        data = memoryview(data)
        while len(data):  # an unbuffered file may take less than it is given
            data = data[self._file.write(data) :]

    def append_tensor(self, name: str, tensor: StoredTensor) -> None:
        """Appends a tensor's values. Those of a mapped file are read from there: pages of the mapping would stay."""
        values, dtype = tensor.read().contiguous().reshape(-1), DTYPES[tensor.dtype]
        path, place = _mapped_file(values) or (None, 0)
        for part in values.split(_BYTES_AT_ONCE // dtype.itemsize):
            size = len(part) * dtype.itemsize
            if path and part.dtype == dtype:
                self._copy(path, place, size)
            else:
                part = torch.frombuffer(self._read(path, place, part.nbytes), dtype=part.dtype) if path else part
                cast = part.to(dtype)
                if dtype == torch.float16 and not torch.equal(cast.isfinite(), part.isfinite()):
                    raise ValueError(f"dtype must hold the values, but those of {name} are too large for float16")
                self.append(memoryview(cast.view(torch.uint8).numpy()))
            place += part.nbytes
            self._advance(size)

    def _copy(self, path: str, place: int, size: int) -> None:
        """Appends a part of another file, which the kernel copies."""
        while size:
            try:
                count = os.sendfile(self._file.fileno(), self._source(path), place, size)
            except OSError:
                self._read(path, place, size)  # says so if this is the file that fails
                raise
            if count == 0:
                self._read(path, place, size)  # raises
            place, size = place + count, size - count

    def _read(self, path: str, place: int, size: int) -> bytearray:
        """A copy of a part of another file."""
        with naming(Path(path)):
            data = bytearray(os.pread(self._source(path), size, place))
        if len(data) != size:
            raise OSError(errno.EIO, "it ends before its tensors do", path)
        return data

    def _source(self, path: str) -> int:
        if path not in self._sources:
            self._sources[path] = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, self._sources[path])
        return self._sources[path]


def _mapped_file(value: Tensor) -> tuple[str, int] | None:
    """The file, and the place in it, that a tensor's memory is mapped from, as far as Linux tells."""
    address = value.data_ptr()
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, _, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            begin, end = (int(number, 16) for number in span.split("-"))
            if begin <= address < end:
                whole = path and address + value.nbytes <= end and os.stat(path[0]).st_ino == int(inode)
                return (path[0], int(offset, 16) + address - begin) if whole else None
    return None
