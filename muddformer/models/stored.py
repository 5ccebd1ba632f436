"""Tensors in files: safetensors, and the pickles of ``torch.save`` as far as they hold tensors and nothing else.

Files are not trusted. Safetensors headers are checked by that library; pickles are read by torch's unpickler of
weights, which refuses anything that would run code before it runs.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._checks import shown, shown_name
from .._files import parse_json

__all__ = ["DTYPES", "DTYPE_NAMES", "StoredTensor", "open_tensors"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights by the names that safetensors has for them."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """A tensor in an open file.

    Attributes:
        shape: its shape.
        dtype: a key of :data:`DTYPES`, or the name of another dtype.
        read: gives its values on the CPU, as a view of the mapped file where that is possible: valid while it is open.
            They may be of another dtype than they are to be written in.
    """

    shape: list[int]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Number of bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def map(self, take: Callable[[Tensor], Tensor]) -> StoredTensor:
        """What ``take`` makes of its values when they are read; its shape is found on the meta device."""
        shape = list(take(torch.empty(self.shape, device="meta")).shape)
        return StoredTensor(shape, self.dtype, lambda: take(self.read()))


@contextmanager
def open_tensors(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """All tensors of a file by name: a pickle if its name ends with ``.bin``, else safetensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged or holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".bin":
        yield {name: _stored(path, name, value) for name, value in _unpickled(path).items()}
        return
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a complete safetensors file: {shown(error, 300)}") from error
    _check_header(path)
    with file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        yield {
            name: StoredTensor(list(part.get_shape()), part.get_dtype(), lambda name=name: file.get_tensor(name))
            for name, part in slices.items()
        }


def _check_header(path: Path) -> None:
    """Refuses what the library reads in one way of several, as the C++ library does: names twice, other forms."""
    with path.open("rb") as file:
        text = file.read(struct.unpack("<Q", file.read(8))[0])
    where = f"{path}: not a complete safetensors file"
    if not text.startswith(b"{"):
        raise ValueError(f"{where}: its header does not begin with {{")
    for name, entry in parse_json(text, path).items():
        if not isinstance(entry, dict) and (name != "__metadata__" or entry is not None):
            raise ValueError(f"{where}: {shown_name(name)}: expected an object of dtype, shape and data_offsets")


def _unpickled(path: Path) -> Mapping[str, Any]:
    # Only the zip files that torch.save has made since version 1.6 can be mapped.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities that are refused here
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of damaged bytes an unpickler may raise anything
        told = str(error).strip() or type(error).__name__
        code = re.search(r"GLOBAL (\S+)", told) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            message = f"{path}: refused before anything in it ran: a pickle with more than tensors in it, {code[1]}"
        else:
            message = f"{path}: not a complete file of torch.save with tensors alone: {told.splitlines()[-1][:200]}"
        raise ValueError(message) from error
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: must hold tensors by name, got {type(values).__name__}")
    return values


def _stored(path: Path, name: str, value: Any) -> StoredTensor:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{path}: {name} must be an ordinary tensor with values, got {type(value).__name__}")
    value = value.detach()
    return StoredTensor(list(value.shape), DTYPE_NAMES.get(value.dtype, str(value.dtype)), lambda: value)
