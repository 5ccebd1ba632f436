"""Text files to train on: which ones, which part of them is held out, and their text."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

__all__ = ["Document", "find_documents", "split_documents"]

_PIECE_BYTES = 1 << 20
_THIRD_PARTY = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class Document:
    """A text file, or the bytes from ``start`` to ``end`` of one.

    ``key`` is its path below the folder that was given, led by that folder's name: what the split goes by, so that it
    does not depend on where the folder lies.
    """

    key: str
    path: Path
    start: int = 0
    end: int | None = None

    def chunks(self) -> Iterator[bytes]:
        """Its bytes in pieces of whole lines, each of about a mebibyte unless a line is longer.

        Raises:
            InputError: if the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = (os.fstat(file.fileno()).st_size if self.end is None else self.end) - self.start
                while left > 0 and (lines := file.readlines(min(_PIECE_BYTES, left))):
                    chunk = b"".join(lines)[:left]
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise InputError(f"cannot read {str(self.path)!r}: {error.strerror}") from error

    def pieces(self) -> Iterator[str]:
        """Its text in the same pieces; bytes that are not UTF-8 become U+FFFD."""
        return (chunk.decode("utf-8", errors="replace") for chunk in self.chunks())


def find_documents(paths: Sequence[str], pattern: str = "*") -> list[Document]:
    """The files to train on, in an order that depends on their keys alone.

    Args:
        paths: text files and folders. In folders, hidden, empty and binary files (a zero byte near the start) and those
            whose name does not match ``pattern`` are left out, links to folders are not followed. Empty: the Python
            files of the running interpreter's standard library.
        pattern: shell pattern for the names of files in folders.

    Raises:
        InputError: if a path does not exist, is neither file nor folder, cannot be read, or if there is no text at all.
    """
    documents: dict[Path, Document] = {}
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = {path: Document(f"stdlib/{key}", path) for key, path in _walk(root, "*.py")}
    for given in paths:
        root = Path(given).expanduser()
        if root.is_dir():
            name = root.resolve().name
            found = [Document(f"{name}/{key}", path) for key, path in _walk(root, pattern)]
        elif root.is_file():
            if _is_binary(root):
                raise InputError(f"{given!r} is not a text file: it has zero bytes")
            found = [Document(root.name, root)] if root.stat().st_size else []
        elif root.exists():
            raise InputError(f"{given!r} is neither a file nor a folder")
        else:
            raise InputError(f"{given!r} does not exist")
        for document in found:  # a file named twice counts once
            documents.setdefault(document.path.resolve(), document)
    if not documents:
        places = ", ".join(repr(str(path)) for path in paths) or repr(str(root))
        raise InputError(f"no text to train on in {places} (pattern {pattern!r})")
    return sorted(documents.values(), key=lambda document: (document.key, str(document.path)))


def split_documents(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents.

    A document is held out if the hash of its key falls into the lowest ``val_fraction`` of its range, so adding or
    removing files moves no other file. Of few files at least one lands on each side; a single file gives up its last
    lines instead.
    """
    if len(documents) == 1:
        return _split_lines(documents[0], val_fraction)
    held_out = {document for document in documents if _place(document) < val_fraction}
    if not held_out:
        held_out = {min(documents, key=_place)}
    elif len(held_out) == len(documents):
        held_out.remove(max(documents, key=_place))
    return [d for d in documents if d not in held_out], [d for d in documents if d in held_out]


def _place(document: Document) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(document.key.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _split_lines(document: Document, val_fraction: float) -> tuple[list[Document], list[Document]]:
    with document.path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        cut = file.seek(int(size * (1 - val_fraction)))
        cut += len(file.readline())
    if cut >= size:  # the cut fell into the last line: part of it is held out
        cut = int(size * (1 - val_fraction))
    return [Document(document.key, document.path, 0, cut)], [Document(document.key, document.path, cut, size)]


def _walk(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    def fail(error: OSError) -> None:
        raise InputError(f"cannot read folder {error.filename!r}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        if "settings.json" in files and "checkpoints" in folders:  # a run of ours, which may be written right now
            folders[:] = []
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _THIRD_PARTY]
        for name in files:
            path = Path(folder, name)
            if name.startswith(".") or not fnmatch.fnmatch(name, pattern) or not path.is_file():
                continue
            if path.stat().st_size and not _is_binary(path):
                yield path.relative_to(root).as_posix(), path


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
