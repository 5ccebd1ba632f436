"""Makes the corpus from Debian packages, by one command: ``python benchmarks/quality/corpus.py FOLDER``.

Downloads the packages of corpus.yaml with apt-get (no root needed), takes the text files, holds out about one in a
hundred by the hash of its path, trains a BPE tokenizer on the others and writes token ids in compressed parts
(parts.py) to FOLDER/parts. Downloads stay in FOLDER/packages; the text is removed again.

Files are found and read here, not as ``muddformer train`` does it: rows can be compared with those measured before only
if the corpus stays the same to the byte.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from parts import DTYPE, digest, write_manifest, write_part

from muddformer.errors import InputError
from muddformer.inference.tokenizer import SEPARATOR, train_tokenizer
from muddformer.training.corpus import Document, split_documents

READING = "whole files as UTF-8, U+FFFD for other bytes, byte order marks kept, links only where corpus.yaml has them"
_FILES_AT_ONCE = 256
_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__")


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="where packages and parts go: about 1 GB, and 4 GB more on the way")
    p.add_argument("--packages", type=Path, default=Path(__file__).with_name("corpus.yaml"), help="what to make it of")
    p.add_argument("--newest", action="store_true", help="take the versions that Debian offers now: another corpus")
    args = p.parse_args(arguments)
    try:
        settings = yaml.safe_load(args.packages.read_text(encoding="utf-8"))
        manifest = make_corpus(settings, args.folder, args.newest)
    except (InputError, OSError, subprocess.CalledProcessError) as error:
        print(f"corpus.py: {error}", file=sys.stderr)
        return 2
    tokens = sum(part["tokens"] for part in manifest["train"])
    print(f"corpus {manifest['id']}: {tokens:,} training tokens in {args.folder / 'parts'}")
    if manifest["id"] != settings.get("id", manifest["id"]):
        say(f"corpus.py: {args.packages} is of corpus {settings['id']}: rows of the two cannot be compared")
    return 0


def make_corpus(settings: dict[str, Any], folder: Path, newest: bool = False) -> dict[str, Any]:
    """Makes FOLDER/parts and returns its manifest.

    Args:
        settings: contents of corpus.yaml.
        folder: where the packages are kept.
        newest: take other versions than those named.

    Raises:
        InputError: if a package cannot be had, or is another one than named.
    """
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    files = {p["package"]: find_package(p, packages, newest) for p in settings["packages"]}
    with tempfile.TemporaryDirectory(dir=folder, prefix="text-") as scratch:
        text = Path(scratch, "text")
        for package in settings["packages"]:
            say(f"unpacking {package['package']}")
            unpack(files[package["package"]], package.get("archive"), text / package["package"])
        manifest = write_parts(choose(text, settings), settings, folder / "parts")
    manifest["packages"] = {name: _field(path, "Version") for name, path in files.items()}
    manifest["reading"] = READING
    manifest["tokenizers"] = importlib.metadata.version("tokenizers")
    return write_manifest(folder / "parts", manifest)


def find_package(package: dict[str, Any], folder: Path, newest: bool) -> Path:
    """The file of a package, downloaded unless it is there.

    Raises:
        InputError: if Debian does not offer it, or its hash differs.
    """
    name, version = package["package"], package["version"]
    there = list(folder.glob(f"{name}_*.deb"))
    for path in there:
        if not newest and _sha256(path) == package["sha256"]:
            return path
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        command = ["apt-get", "download", "-qq", name if newest else f"{name}={version}"]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if result.returncode:
            raise InputError(
                f"cannot download {name} {version}: {' '.join(result.stderr.split())}; apt-get update may help, or "
                "--newest, which takes what Debian offers now and gives another corpus"
            )
        (path,) = Path(scratch).glob(f"{name}_*.deb")
        if not newest and _sha256(path) != package["sha256"]:
            raise InputError(
                f"{path.name} has sha256 {_sha256(path)}, not {package['sha256']} as expected of {name} {version}"
            )
        for old in there:  # of another version, or damaged
            old.unlink()
        return path.replace(folder / path.name)


def unpack(package: Path, archive: str | None, target: Path) -> None:
    """Unpacks a package, or only an archive that is in it, into a folder."""
    target.mkdir(parents=True)
    if archive is None:
        subprocess.run(["dpkg-deb", "-x", package, target], check=True)
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".deb-") as scratch:
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        path = Path(scratch, archive)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as file:
                file.extractall(target)
        else:
            subprocess.run(["tar", "-xf", path, "-C", target, "--no-same-owner"], check=True)


def choose(text: Path, settings: dict[str, Any]) -> list[Document]:
    """The files with their package's suffixes that are not too large, each text once, in a random order."""
    text, documents = text.resolve(), []
    for package in settings["packages"]:
        root = text / package["package"]
        # A link is another name of a file: but for those that are named, which stand for the files they lead to.
        links = {root / link for link in package.get("links", ())}
        targets = {link.resolve() for link in links}
        suffixes = {f".{suffix}" for suffix in package["suffixes"]}
        for path in find_files(root):
            if path not in links and (path.is_symlink() or path in targets):
                continue
            if path.suffix in suffixes and 0 < path.stat().st_size <= settings["largest_file"] and not is_binary(path):
                documents.append(Document(f"text/{path.relative_to(text).as_posix()}", path))
    first = {}
    for document in sorted(documents, key=lambda document: document.key):
        first.setdefault(digest(document.path.read_bytes()), document)
    return sorted(first.values(), key=lambda document: digest(b"order of " + os.fsencode(document.key)))


def find_files(root: Path) -> Iterator[Path]:
    """The files of a folder that are not hidden, links to folders not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def is_binary(path: Path) -> bool:
    """Whether there is a zero byte near its start."""
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def read(document: Document) -> str:
    """The text of a file, as READING says."""
    return document.path.read_bytes().decode("utf-8", errors="replace")


def write_parts(documents: Sequence[Document], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains the tokenizer, writes it and the parts, and returns the manifest."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    train, held_out = split_documents(documents, settings["held_out"])
    sample = train[:: settings["tokenizer_sample"]]
    say(f"training the tokenizer on {len(sample):,} of {len(train):,} files")
    tokenizer = train_tokenizer(map(read, sample), settings["vocab_size"], longest_word=None)  # words are not cut
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    manifest = {
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer": digest((folder / "tokenizer.json").read_bytes()),
        "documents": {"train": len(train), "held_out": len(held_out)},
    }
    ids = np.concatenate(list(encode(held_out, tokenizer)))
    manifest["held_out"] = write_part(folder / "held-out.xz", ids)
    parts: list[Future] = []
    with ThreadPoolExecutor(2) as pool:  # compressing takes longer than encoding, and holds no lock
        for ids in itertools.islice(regroup(encode(train, tokenizer), settings["part_tokens"]), settings["parts"]):
            say(f"part {len(parts)}: {len(ids):,} tokens")
            parts.append(pool.submit(write_part, folder / f"train-{len(parts):03}.xz", ids))
            if len(parts) > 2:
                parts[-3].result()  # no more than two parts wait in memory
    manifest["train"] = [part.result() for part in parts]
    return manifest


def encode(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids of the documents, some documents at a time, each with a separator behind it."""
    separator, remaining = [tokenizer.token_to_id(SEPARATOR)], iter(documents)
    while batch := list(itertools.islice(remaining, _FILES_AT_ONCE)):
        encodings = tokenizer.encode_batch_fast(list(map(read, batch)))
        yield np.array([i for e in encodings for i in itertools.chain(e.ids, separator)], DTYPE)


def regroup(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same ids in arrays of ``size``; the last may be shorter."""
    waiting, count = [], 0
    for array in arrays:
        waiting.append(array)
        count += len(array)
        while count >= size:
            joined = np.concatenate(waiting)
            yield joined[:size]
            waiting, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(waiting)


def say(text: str) -> None:
    """Tells people on stderr."""
    print(text, file=sys.stderr, flush=True)


def _field(package: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True).stdout.strip()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
