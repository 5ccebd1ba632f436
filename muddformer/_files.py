"""Files: written so that they appear under their names only when all of them is on the disk, read, locked."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ._checks import shown

__all__ = ["FileLock", "naming", "parse_json", "read_json", "remove", "sync", "write_atomically"]


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets ``write`` fill a file beside ``path`` and then gives it that name; an interrupted write leaves the old file.

    Raises:
        OSError: naming ``path``, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path, temporary):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Lets errors of using a file be OSErrors that name it, those of a full disk above all, which name none.

    Args:
        path: the file, or a folder of files.
        temporary: what the file is called until it is complete.

    Raises:
        OSError: that one; or as it came, if it names another file: one that was read meanwhile.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        named = getattr(error, "filename", None)
        if isinstance(named, str | os.PathLike) and not {path, temporary} & {Path(named), *Path(named).parents}:
            raise
        told = re.search(r"os error (\d+)", str(error))  # as the library of safetensors has it
        number = getattr(error, "errno", None) or (int(told[1]) if told else None)
        reason = os.strerror(number) if number else str(error)
        raise OSError(number or errno.EIO, reason, str(path)) from error


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, not what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(path: Path) -> None:
    """Returns when a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, limit: int = 2**26) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes, as :func:`parse_json` reads it.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many, at most {limit} are read")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a text that is not trusted, by the rules of the C++ library: UTF-8 without a byte order mark,
    no key twice, no NaN, no number beyond float64, at most 16 levels of objects and arrays.

    Raises:
        ValueError: naming the file, which is ``path``, and what is wrong.
    """
    try:
        hooks = {"parse_constant": _refused, "parse_float": _real, "parse_int": _integer}
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_object, **hooks)
        _check_levels(values, 16)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {shown(error, 300)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {shown(twice)} twice in one object")
    return values


def _refused(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is out of range")
    return value


def _integer(text: str) -> int:
    _real(text)
    return int(text)


def _check_levels(value: Any, levels: int) -> None:
    """Refuses what is nested deeper, and text that is not Unicode: half of a surrogate pair."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (dict, list)):
        if not levels:
            raise ValueError("it is nested more than 16 levels deep")
        for item in value:
            _check_levels(item, levels - 1)
        for item in value.values() if isinstance(value, dict) else ():
            _check_levels(item, levels - 1)


class FileLock:
    """A file that one process holds at a time; whatever ends the process ends its hold too.

    Args:
        path: the file. It stays when the lock is released.

    Raises:
        BlockingIOError: if another process, or another lock of this one, holds it; ``str(error)`` names the process.
        OSError: if the file cannot be made or locked.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read(20).strip()
            self._file.close()
            raise BlockingIOError(f"process {holder or 'unknown'}") from error
        except OSError:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    @property
    def held(self) -> bool:
        """Whether it was not released yet."""
        return not self._file.closed

    def release(self) -> None:
        """Lets others have it."""
        self._file.close()
