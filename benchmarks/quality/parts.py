"""The corpus as runs read it: token ids in compressed parts, small enough to be carried to a machine one by one.

A folder holds::

    corpus.json          packages, numbers of tokens, checksums and ``id``
    tokenizer.json       the tokenizer of the ids
    held-out.xz          ids of the held-out files
    train-000.xz ...     ids of the training files, which follow in a random order: each part is a fair sample

Token ids are uint16, little endian, and the tokenizer's separator follows each file. A run on n tokens reads the first
n: training parts may be missing at the end, and more may be added there. So the corpus's ``id`` is the hash of the
tokenizer, of the held-out ids and of the first training part.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from muddformer.errors import InputError

__all__ = ["DTYPE", "Parts", "digest", "write_manifest", "write_part"]

DTYPE = np.dtype("<u2")
# In pairs of bytes the parity of the place says much (lp, pb) and the byte before it nothing (lc).
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26, "lc": 0, "lp": 1, "pb": 1}]


class Parts:
    """A folder of parts.

    Args:
        folder: where they are.

    Attributes:
        id: hash of the corpus.
        vocab_size: tokens of the tokenizer.
        tokenizer_json: the tokenizer.

    Raises:
        InputError: if there is no corpus, or one with another hash than its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            self.tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
            self.id, self.vocab_size = self.manifest["id"], self.manifest["vocab_size"]
            same = self.id == _identify(self.manifest)
            same = same and self.manifest["tokenizer"] == digest(self.tokenizer_json.encode())
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{str(folder)!r} holds no corpus, corpus.py makes one: {error!r}") from error
        if not same:
            raise InputError(f"corpus.json or tokenizer.json in {str(folder)!r} was altered: it has another hash")

    def train(self, count: int) -> np.ndarray:
        """The first ``count`` training ids, uint16 [count].

        Raises:
            InputError: if they are not all there, or a part has another hash.
        """
        chosen, total = [], 0
        for part in self.manifest["train"]:
            if total >= count:
                break
            chosen.append(part)
            total += part["tokens"]
        if total < count:
            raise InputError(
                f"the corpus in {str(self.folder)!r} has {total:,} training tokens, {count:,} are asked for"
            )
        with ThreadPoolExecutor() as pool:  # decompressing holds no lock
            return np.concatenate(list(pool.map(self._read, chosen)))[:count]

    def held_out(self) -> np.ndarray:
        """All held-out ids, uint16, 1-d.

        Raises:
            InputError: as above.
        """
        return self._read(self.manifest["held_out"])

    def _read(self, part: dict[str, Any]) -> np.ndarray:
        path = self.folder / part["file"]
        try:
            data = lzma.decompress(path.read_bytes())
        except (OSError, lzma.LZMAError) as error:
            raise InputError(f"cannot read {str(path)!r}, a part of the corpus: {error}") from error
        if digest(data) != part["blake2b"]:
            raise InputError(f"{str(path)!r} has another hash than the part that corpus.json names")
        return np.frombuffer(data, DTYPE)


def write_part(path: Path, ids: np.ndarray) -> dict[str, Any]:
    """Writes a part and returns what the manifest says of it."""
    data = ids.astype(DTYPE).tobytes()
    path.write_bytes(lzma.compress(data, filters=_FILTERS))
    return {"file": path.name, "tokens": len(ids), "blake2b": digest(data)}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes ``corpus.json`` from ``vocab_size``, ``tokenizer``, ``held_out``, ``train`` and anything else to tell.

    Returns:
        What it holds: the same and ``id``.
    """
    manifest = {"id": _identify(manifest), **manifest}
    (folder / "corpus.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def digest(data: bytes) -> str:
    """A checksum, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _identify(manifest: dict[str, Any]) -> str:
    hashes = (manifest["tokenizer"], manifest["held_out"]["blake2b"], manifest["train"][0]["blake2b"])
    return digest("".join(hashes).encode())[:12]
