"""Token files and batches.

A corpus is tokenized once into a folder of the cache, named by the hash of everything it was made from::

    train.bin, val.bin   token ids, uint16 or uint32 in native byte order, a separator after each document
    tokenizer.json       trained on the training split alone
    header.json          what the folder was made from, sizes and checksums

The folder appears under its name only when it is complete. Batches read the files through a memory map.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_integer
from ..errors import InputError, require
from ..inference.tokenizer import SEPARATOR, parse_tokenizer, train_tokenizer
from .corpus import Document, find_documents, report_misread, split_documents, told
from .settings import DataSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batches", "Corpus", "CorruptCache", "held_out_batches", "open_corpus", "prepare_corpus"]

_FORMAT = 2
_SPLITS = ("train", "val")
_FILES = ("tokenizer.json", "train.bin", "val.bin")
_ITEMS_AT_ONCE = 64
_SECONDS_BETWEEN_NEWS = 5.0


class CorruptCache(InputError):
    """A folder of token files is damaged."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
        train, val: token ids of the two splits, memory-mapped, 1-d, uint16 or uint32.
        tokenizer: the tokenizer.
        vocab_size: number of tokens of the tokenizer.
        header: contents of ``header.json``.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    vocab_size: int
    header: dict[str, Any]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Checksums of the tokenizer and of both splits: equal for equal token ids."""
        return self.header["checksums"]


def prepare_corpus(settings: DataSettings, say: Callable[[str], None] = lambda text: None) -> Corpus:
    """The tokenized corpus of the settings, from the cache if it is there and whole, else made now.

    Args:
        settings: section ``data``.
        say: told in one line what is done.

    Raises:
        InputError: if there is no text, a file cannot be read, or the cache folder cannot be written.
    """
    left_out: dict[str, list[str]] = {}
    documents = find_documents(settings.paths, settings.pattern, settings.text_field, left_out)
    sources = _hash_sources(documents, settings)
    folder = _cache_root(settings) / sources[:20]
    if folder.exists():
        try:
            return _tell(open_corpus(folder), left_out, say)
        except CorruptCache as error:
            say(f"{error}; making it anew")
    say(f"tokenizing {len(documents)} files into {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as scratch:
            made = Path(scratch, "new")
            made.mkdir()
            _tokenize(documents, settings, sources, made, say)
            _publish(made, folder, Path(scratch, "damaged"))
    except OSError as error:
        raise InputError(f"cannot write the token files to {str(folder.parent)!r} (data.cache_dir): {error}") from error
    return _tell(open_corpus(folder), left_out, say)


def open_corpus(folder: Path) -> Corpus:
    """A corpus that :func:`prepare_corpus` made.

    Raises:
        CorruptCache: if a file is missing, truncated or altered, naming it.
    """
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise CorruptCache(f"{folder} has format {header['format']}, not {_FORMAT}")
        dtype = np.dtype(header["dtype"])
        for name in _FILES:
            if _checksum(folder / name) != header["checksums"][name]:
                raise CorruptCache(f"{folder / name} is damaged: its checksum differs")
        tokenizer = parse_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
        train, val = (np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in _SPLITS)
    except CorruptCache:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCache(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    return Corpus(train, val, tokenizer, tokenizer.get_vocab_size(), header)


class Batches:
    """Training sequences in an order that depends on the token ids, block size and seed alone, not on the model.

    In each epoch the token ids are cut, from a random place on, into windows that do not overlap, and the windows are
    shuffled; windows may span documents.

    Args:
        tokens: token ids, 1-d.
        block_size: tokens per sequence.
        seed: of the order.

    Raises:
        InputError: if there are fewer than ``block_size + 1`` tokens.
        TypeError, ValueError: for a wrong ``block_size`` or ``seed``.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int) -> None:
        check_integer("block_size", block_size)
        check_integer("seed", seed, 2**63 - 1, low=0)
        _check_length(tokens, block_size, "training")
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        self.windows = max(1, (len(tokens) - 1) // block_size - 1)  # leaves room to begin anywhere in the first window
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def __call__(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``count`` sequences from number ``first`` >= 0 on, int64 [count, block_size] each."""
        return _gather(self.tokens, [self._start(n) for n in range(first, first + count)], self.block_size)

    def _start(self, sequence: int) -> int:
        epoch, place = divmod(sequence, self.windows)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            begin = random.integers(len(self.tokens) - self.windows * self.block_size)
            self._starts = begin + self.block_size * random.permutation(self.windows)
            self._epoch = epoch
        return int(self._starts[place])


def held_out_batches(tokens: np.ndarray, block_size: int, batch_size: int, batches: int) -> list[tuple[Tensor, Tensor]]:
    """At most ``batches`` batches of windows spread evenly over the held-out split, always the same.

    Returns:
        Inputs and targets, int64 [batch_size, block_size] each; of a split with fewer windows, one smaller batch.

    Raises:
        InputError: if there are fewer than ``block_size + 1`` tokens.
    """
    _check_length(tokens, block_size, "held-out")
    windows = (len(tokens) - 1) // block_size
    batch_size = min(batch_size, windows)
    count = min(windows // batch_size, batches) * batch_size
    starts = [(n * windows // count) * block_size for n in range(count)]
    return [_gather(tokens, starts[n : n + batch_size], block_size) for n in range(0, count, batch_size)]


def _gather(tokens: np.ndarray, starts: Sequence[int], block_size: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _check_length(tokens: np.ndarray, block_size: int, split: str) -> None:
    if len(tokens) < block_size + 1:
        raise InputError(
            f"the {split} split has {len(tokens)} tokens, too few for model.block_size {block_size}: give more text"
        )


def _cache_root(settings: DataSettings) -> Path:
    if settings.cache_dir is not None:
        return Path(settings.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muddformer"


def _tell(corpus: Corpus, left_out: Mapping[str, Sequence[str]], say: Callable[[str], None]) -> Corpus:
    """Says what was read, what was left out, and why."""
    read = corpus.header["read"]
    say(f"text: {read['files']:,} files, {read['bytes']:,} bytes of UTF-8{told(left_out)}")
    if read["misread"]:
        say(report_misread(read["misread"]))
    return corpus


def _hash_sources(documents: Sequence[Document], settings: DataSettings) -> str:
    """Hash of all that the token files depend on: text, split, vocabulary, library and format."""
    made_by = [_FORMAT, sys.byteorder, require("tokenizers").__version__, settings.vocab_size, settings.val_fraction]
    made_by.append(settings.text_field)
    total = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16)
    for document in documents:
        total.update(document.key.encode("utf-8", errors="surrogateescape") + b"\0")
        content = hashlib.blake2b(digest_size=16)
        for chunk in document.chunks():
            content.update(chunk)
        total.update(content.digest())
    return total.hexdigest()


def _tokenize(
    documents: Sequence[Document], settings: DataSettings, sources: str, folder: Path, say: Callable[[str], None]
) -> None:
    splits = dict(zip(_SPLITS, split_documents(documents, settings.val_fraction), strict=True))
    reading, misread = _Progress("reading for the tokenizer", say), {}
    texts = (piece for piece in reading.over(_pieces(splits["train"], misread)) if piece)
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    header = {"format": _FORMAT, "sources": sources, "dtype": np.dtype(dtype).name, "documents": {}, "tokens": {}}
    header["vocab_size"] = tokenizer.get_vocab_size()
    size = 0
    for split, chosen in splits.items():
        header["documents"][split] = len(chosen)
        writing = _Progress(f"tokenizing {split}", say, reading.done if split == "train" else None)
        pieces = writing.over(_pieces(chosen, misread))
        header["tokens"][split] = _write_tokens(folder / f"{split}.bin", pieces, tokenizer, dtype)
        size += writing.done
    header["read"] = {"files": len(documents), "bytes": size, "misread": misread}
    header["checksums"] = {name: _checksum(folder / name) for name in _FILES}
    (folder / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def _pieces(documents: Sequence[Document], misread: dict[str, int]) -> Iterator[str | None]:
    """The pieces of all documents, None after each text; counts by file what was not in its encoding."""
    for document in documents:
        counts: list[int] = []
        yield from document.pieces(counts)
        if counts:
            misread[document.key] = sum(counts)


class _Progress:
    """Says every few seconds how many bytes of text, or how much of a known number of them, went by."""

    def __init__(self, task: str, say: Callable[[str], None], total: int | None = None) -> None:
        self.done, self._task, self._say, self._total = 0, task, say, total
        self._told = time.monotonic()

    def over(self, pieces: Iterable[str | None]) -> Iterator[str | None]:
        """The same pieces, counted."""
        for piece in pieces:
            self.done += len(piece.encode()) if piece else 0
            yield piece
            if time.monotonic() - self._told >= _SECONDS_BETWEEN_NEWS:
                self._told = time.monotonic()
                self._say(f"{self._task}: {self.done / 1e6:,.0f} MB" + self._share())

    def _share(self) -> str:
        return f", {self.done / self._total:.0%}" if self._total else ""


def _publish(made: Path, folder: Path, grave: Path) -> None:
    """Gives the folder ``made`` its name, unless another process has put a whole one, the same, there."""
    try:
        open_corpus(folder)
    except CorruptCache:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(grave)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else the other process was faster by a moment
                raise


def _write_tokens(path: Path, pieces: Iterator[str | None], tokenizer: Tokenizer, dtype: type) -> int:
    """Writes the ids of the pieces, a separator for each None, and returns their number."""
    with path.open("wb") as file:
        while batch := list(itertools.islice(pieces, _ITEMS_AT_ONCE)):
            encodings = iter(tokenizer.encode_batch_fast([piece for piece in batch if piece is not None]))
            for piece in batch:
                ids = [tokenizer.token_to_id(SEPARATOR)] if piece is None else next(encodings).ids
                file.write(np.array(ids, dtype).tobytes())
        return file.tell() // np.dtype(dtype).itemsize


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
