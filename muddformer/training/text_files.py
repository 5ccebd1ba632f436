"""Text out of files: encodings, compression, and tables of texts.

A file's name says how it is packed (``.gz``, ``.bz2``, ``.xz``, ``.zst``) and whether it is a table of texts
(``.jsonl``, ``.ndjson``, ``.parquet``), of which one field is read. Text is UTF-8, or what a byte order mark says.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from .._checks import shown
from ..errors import InputError, require

__all__ = ["BrokenFile", "is_text", "read_texts"]

_PIECE = 1 << 20
_OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_ZstFile(path)),
}
_TABLES = (".jsonl", ".ndjson", ".parquet")
# The marks of UTF-32 first: that of UTF-16 begins one of them. The decoders drop the marks.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


class BrokenFile(InputError):
    """A packed file or a table does not hold what its suffix says."""


def is_text(path: Path) -> bool:
    """Whether a file is one that :func:`read_texts` reads: a table, or text, which has no zero bytes near its start.

    Raises:
        BrokenFile: if its beginning is not of the packing or table that its suffix says.
        InputError: if it cannot be read.
    """
    with _reading(path), _open(path) as file:
        start = file.read(8192)
    suffix = _kind(path)[1]
    if suffix == ".parquet" and not start.startswith(b"PAR1"):
        raise BrokenFile(f"cannot read {str(path)!r}: not a Parquet file")
    return suffix in _TABLES or b"\0" not in start or _encoding(start) != "utf-8"


def read_texts(path: Path, field: str, misread: list[int]) -> Iterator[str | None]:
    """The texts of a file in pieces of about 2**20 characters, which end with lines where these are shorter.

    Args:
        path: the file.
        field: which field of a table has the texts.
        misread: gets, for every block of the file that has some, how many U+FFFD stand for bytes that are not of the
            file's encoding.

    Returns:
        Pieces, and None after each whole text: one in a plain file, as many as rows in a table.

    Raises:
        InputError: naming the file that cannot be read, unpacked or parsed, or that has no such field.
    """
    kind = _kind(path)[1]
    with _reading(path):
        if kind == ".parquet":
            texts = _parquet_texts(path, field)
        elif kind in _TABLES:
            texts = _json_texts(path, field, misread)
        else:
            yield from _lines(path, misread)
            yield None
            return
        for text in texts:
            yield from (text[begin : begin + _PIECE] for begin in range(0, len(text), _PIECE))
            yield None


def _kind(path: Path) -> tuple[str, str]:
    """The suffix of the packing, or nothing, and the one before it, in small letters."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    return packing, suffixes[-1] if suffixes else ""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        problem = InputError if getattr(error, "errno", None) else BrokenFile
        raise problem(f"cannot read {str(path)!r}: {reason}") from error


def _open(path: Path) -> AbstractContextManager[IO[bytes]]:
    return _OPENERS.get(_kind(path)[0], lambda path: path.open("rb"))(path)


class _ZstFile(io.RawIOBase):
    """A file of one or more frames of zstandard. The package's own reader takes one that is cut for a shorter text."""

    def __init__(self, path: Path) -> None:
        self._zstandard = require("zstandard", "data")
        self._file = path.open("rb")
        self._frame, self._rest, self._made = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while not self._made and (block := self._rest or self._file.read(_PIECE)):
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._made = self._frame.decompress(block)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._rest = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        if not self._made and self._frame is not None:
            raise EOFError("it ends before the end of its text")
        count = min(len(buffer), len(self._made))
        buffer[:count], self._made = self._made[:count], self._made[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _encoding(start: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


def _lines(path: Path, misread: list[int]) -> Iterator[str]:
    """A plain text in pieces of whole lines, or parts of lines that are longer than a piece."""
    with _open(path) as file:
        block = file.read(_PIECE)
        encoding = _encoding(block)
        decoder, rest = codecs.getincrementaldecoder(encoding)(), ""
        while True:
            state, decoder.errors = decoder.getstate(), "strict"
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                decoder.setstate(state)
                decoder.errors = "replace"
                decoded = decoder.decode(block, final=not block)
                misread.append(decoded.count("\ufffd"))
                rest += decoded
            if not block:
                break
            end = rest.rfind("\n") + 1 or (len(rest) if len(rest) >= _PIECE else 0)
            if end:
                yield rest[:end]
                rest = rest[end:]
            block = file.read(_PIECE)
        if rest:
            yield rest


def _json_texts(path: Path, field: str, misread: list[int]) -> Iterator[str]:
    def lines() -> Iterator[str]:
        parts: list[str] = []  # of a line that is longer than a piece
        for piece in _lines(path, misread):
            first, *others = piece.split("\n")
            parts.append(first)
            for other in others:
                yield "".join(parts)
                parts = [other]
        yield "".join(parts)

    for number, line in enumerate(lines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r}, line {number}: not valid JSON: {shown(error)}") from error
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(map(shown, list(row)[:9])) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise InputError(
                f"{str(path)!r}, line {number}: no text in the field {field!r} (data.text_field, --text-field); "
                f"it has {fields}"
            )
        yield text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no text


def _parquet_texts(path: Path, field: str) -> Iterator[str]:
    parquet = require("pyarrow.parquet", "data")
    try:
        table = parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            names = ", ".join(map(shown, table.schema_arrow.names[:9]))
            raise InputError(f"{str(path)!r}: no field {field!r} (data.text_field, --text-field); it has {names}")
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise InputError(f"{str(path)!r}: the field {field!r} holds a {type(text).__name__}, not a text")
                yield text or ""
    except require("pyarrow").ArrowException as error:
        raise InputError(f"cannot read {str(path)!r}: {shown(error)}") from error
