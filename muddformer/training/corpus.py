"""Text files to train on: which ones, which part of them is held out, and their text."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .._checks import shown
from ..errors import InputError
from .text_files import BrokenFile, is_text, read_texts

__all__ = ["Document", "find_documents", "report_misread", "split_documents", "told"]

_THIRD_PARTY = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class Document:
    """A file of one or more texts, or its characters from ``start`` to ``end``.

    ``key`` is its path below the folder that was given, led by that folder's name: what the split goes by, so that it
    does not depend on where the folder lies. ``field`` is the one of a table that has the texts.
    """

    key: str
    path: Path
    start: int = 0
    end: int | None = None
    field: str = "text"

    def chunks(self) -> Iterator[bytes]:
        """The bytes of its file as they lie on the disk.

        Raises:
            InputError: if the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk
        except OSError as error:
            raise InputError(f"cannot read {str(self.path)!r}: {error.strerror}") from error

    def pieces(self, misread: list[int] | None = None) -> Iterator[str | None]:
        """Its text in pieces, and None after each whole text; see :func:`.text_files.read_texts`."""
        place = 0
        for piece in read_texts(self.path, self.field, [] if misread is None else misread):
            if self.end is not None and place >= self.end:
                break
            if piece is None:
                if place > self.start:
                    yield None
                continue
            part = piece[max(0, self.start - place) : None if self.end is None else self.end - place]
            place += len(piece)
            if part:
                yield part
        else:
            return
        yield None

    def texts(self, misread: list[int] | None = None) -> Iterator[tuple[str, list[str]]]:
        """Its texts in pieces, each with a name: the key, and from the second text on its number from 0 behind it."""
        number, pieces = 0, []
        for piece in self.pieces(misread):
            if piece is not None:
                pieces.append(piece)
                continue
            yield (f"{self.key}:{number}" if number else self.key), pieces
            number, pieces = number + 1, []


def find_documents(
    paths: Sequence[str], pattern: str = "*", field: str = "text", left_out: dict[str, list[str]] | None = None
) -> list[Document]:
    """The files to train on, in an order that depends on their keys alone.

    Args:
        paths: text files and folders. In folders, hidden, empty and binary files (a zero byte near the start) and those
            whose name does not match ``pattern`` are left out, links to folders are not followed. Empty: the Python
            files of the running interpreter's standard library.
        pattern: shell pattern for the names of files in folders.
        field: of tables, the one that has the texts.
        left_out: gets the files that are left out, by the reason.

    Raises:
        InputError: if a path does not exist, is neither file nor folder, cannot be read, or if there is no text at all.
    """
    left_out = {} if left_out is None else left_out
    documents: dict[Path, Document] = {}
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = {path: Document(f"stdlib/{key}", path) for key, path in _walk(root, "*.py", {})}
    for given in paths:
        root = _given_path(given)
        if root.is_dir():
            name = root.resolve().name
            found = [Document(f"{name}/{key}", path, field=field) for key, path in _walk(root, pattern, left_out)]
        elif root.is_file():
            if not is_text(root):
                raise InputError(f"{given!r} is not a text file: it has zero bytes")
            found = [Document(root.name, root, field=field)] if root.stat().st_size else []
        elif root.exists():
            raise InputError(f"{given!r} is neither a file nor a folder")
        else:
            raise InputError(f"{given!r} does not exist")
        for document in sorted(found, key=lambda document: document.key):  # a file of several names has the first one
            documents.setdefault(document.path.resolve(), document)
    if not documents:
        places = ", ".join(repr(str(path)) for path in paths) or repr(str(root))
        raise InputError(f"no text to train on in {places} (pattern {pattern!r}){told(left_out)}")
    return sorted(documents.values(), key=lambda document: (document.key, str(document.path)))


def told(left_out: Mapping[str, Sequence[str]]) -> str:
    """What was left out and why, as the end of a sentence."""
    parts = []
    for reason, names in left_out.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        parts.append(f"{len(names):,} {reason} ({', '.join(names[:3])}{more})")
    return "; left out: " + ", ".join(parts) if parts else ""


def report_misread(misread: Mapping[str, int]) -> str:
    """What could not be read as UTF-8: by file, the places in it. Not empty."""
    names = sorted(misread, key=misread.__getitem__, reverse=True)
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    return (
        f"{len(names):,} files are not UTF-8 and have no byte order mark: {sum(misread.values()):,} places in them "
        f"became U+FFFD ({listed}); convert them, with iconv for example, if they matter"
    )


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
    size = sum(len(piece) for piece in document.pieces() if piece)
    cut = share = int(size * (1 - val_fraction))
    place = 0
    for piece in document.pieces():  # to the end of the line, or of the text in a table, that the share ends in
        if piece is None:
            if place > share:
                cut = place
                break
            continue
        if place + len(piece) > share and (line := piece.find("\n", max(0, share - place)) + 1):
            cut = place + line
            break
        place += len(piece)
    if cut >= size:  # it is the last line: part of it is held out
        cut = share
    return [replace(document, end=cut)], [replace(document, start=cut)]


def _walk(root: Path, pattern: str, left_out: dict[str, list[str]]) -> Iterator[tuple[str, Path]]:
    def fail(error: OSError) -> None:
        raise InputError(f"cannot read folder {error.filename!r}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        if "settings.json" in files and "checkpoints" in folders:  # a run of ours, which may be written right now
            folders[:] = []
            left_out.setdefault("runs", []).append(folder)
            continue
        kept = [name for name in folders if not name.startswith(".") and name not in _THIRD_PARTY]
        for name in sorted({*folders} - {*kept}):
            left_out.setdefault("hidden or third-party folders", []).append(Path(folder, name).name)
        folders[:] = kept
        for name in sorted(files):
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if reason := _reason(path, pattern):
                left_out.setdefault(reason, []).append(key)
            else:
                yield key, path


def _given_path(given: str) -> Path:
    """A path that was given, which can be looked at."""
    try:
        root = Path(given).expanduser()
        root.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a zero byte
        raise InputError(f"cannot use {shown(given)}: {error}") from error
    return root


def _reason(path: Path, pattern: str) -> str:
    """Why a file of a folder is left out, or nothing."""
    if path.name.startswith("."):
        return "hidden"
    if not fnmatch.fnmatch(path.name, pattern):
        return f"not named {pattern!r}"
    try:
        if not path.is_file():
            return "no files"
        if not path.stat().st_size:
            return "empty"
    except OSError:
        return "not readable"
    try:
        return "" if is_text(path) else "not text"
    except BrokenFile:
        return "damaged"
