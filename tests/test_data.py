"""Corpus, split, tokenizer, token files and batches."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from muddformer.errors import InputError
from muddformer.inference.tokenizer import (
    SEPARATOR,
    StreamDecoder,
    load_tokenizer,
    parse_tokenizer,
    train_tokenizer,
)
from muddformer.training.corpus import Document, find_documents, split_documents
from muddformer.training.data import Batches, CorruptCache, held_out_batches, open_corpus, prepare_corpus
from muddformer.training.settings import DataSettings

WORDS = ["depth", "way", "stream", "key", "value", "query", "residual", "layer", "norm", "token", "größe", "密"]


def write_texts(folder: Path, files: int, words: int = 300) -> Path:
    for number in range(files):
        text = random.Random(number).choices(WORDS, k=words)
        path = folder / f"part{number % 3}" / f"text{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(" ".join(text[i : i + 9]) for i in range(0, words, 9)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts", 12)


@pytest.fixture
def data(texts, tmp_path):
    return DataSettings(paths=(str(texts),), vocab_size=300, val_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def cache_folder(data: DataSettings) -> Path:
    (folder,) = Path(data.cache_dir).iterdir()
    return folder


def keys(documents):
    return [document.key for document in documents]


# ---------------------------------------------------------------------------------------------------------- documents


def test_find_documents_skips_what_is_no_text(tmp_path):
    root = tmp_path / "root"
    (root / ".hidden").mkdir(parents=True)
    (root / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", ".secret", ".hidden/d.txt"):
        (root / name).write_text("text")
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(b"\0\1\2")
    (root / "loop").symlink_to(root)
    assert keys(find_documents([str(root)])) == ["root/a.md", "root/b.txt", "root/sub/c.txt"]
    assert keys(find_documents([str(root)], "*.txt")) == ["root/b.txt", "root/sub/c.txt"]
    assert keys(find_documents([str(root / "b.txt"), str(root)], "*.txt")) == ["b.txt", "root/sub/c.txt"]  # once


def test_default_corpus_is_the_standard_library():
    found = keys(find_documents([]))
    assert "stdlib/argparse.py" in found and "stdlib/json/decoder.py" in found
    assert not any("site-packages" in key or "__pycache__" in key for key in found)


@pytest.mark.parametrize("kind", ["missing", "empty folder", "empty file", "binary", "no match"])
def test_unusable_paths(tmp_path, kind):
    path = tmp_path / "here"
    pattern = "*"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "empty file":
        path.touch()
    elif kind == "binary":
        path.write_bytes(b"a\0b")
    elif kind == "no match":
        path.mkdir()
        (path / "a.txt").write_text("text")
        pattern = "*.md"
    with pytest.raises(InputError, match="here"):
        find_documents([str(path)], pattern)


def test_split_goes_by_key_alone(tmp_path):
    documents = [Document(f"root/{number}.txt", tmp_path / f"{number}.txt") for number in range(400)]
    train, val = split_documents(documents, 0.1)
    assert sorted(keys(train + val)) == sorted(keys(documents)) and 20 <= len(val) <= 60
    fewer_train, fewer_val = split_documents(documents[::2], 0.1)  # without a file the others stay where they are
    assert set(fewer_train) <= set(train) and set(fewer_val) <= set(val)
    larger_val = split_documents(documents, 0.2)[1]
    assert set(val) <= set(larger_val)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_split_of_few_files_leaves_none_empty(tmp_path, count, fraction):
    documents = [Document(f"{number}", tmp_path / f"{number}") for number in range(count)]
    train, val = split_documents(documents, fraction)
    assert train and val and len(train) + len(val) == count


@pytest.mark.parametrize(
    "text", ["one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n", "no line ends here at all"]
)
def test_split_of_one_file_holds_out_its_end(tmp_path, text):
    path = tmp_path / "single.txt"
    path.write_text(text)
    (train,), (val,) = split_documents(find_documents([str(path)]), 0.25)
    parts = ["".join(part.pieces()) for part in (train, val)]
    assert "".join(parts) == text and all(parts)
    assert parts[0].endswith("\n") == ("\n" in text)


def test_pieces_are_whole_lines_and_bad_bytes_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("muddformer.training.corpus._PIECE_BYTES", 10)
    path = tmp_path / "text"
    path.write_bytes("größe\n".encode() * 5 + b"\xff\xfe\n" + "密".encode())
    pieces = list(Document("text", path).pieces())
    assert len(pieces) > 2 and all(piece.endswith("\n") for piece in pieces[:-1])
    assert "".join(pieces) == "größe\n" * 5 + "\ufffd\ufffd\n密"


# ---------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the query, the key and the value\n"] * 20, 280)


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_text_survives_token_by_token(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text).ids
    assert "".join([decoder.push(token) for token in ids] + [decoder.flush()]) == text


def test_characters_come_whole(tokenizer):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode("a密🙂").ids]
    assert [piece for piece in pieces if piece] == ["a", "密", "🙂"] and len(pieces) == 8
    half = tokenizer.encode("🙂").ids[:2]
    assert [decoder.push(token) for token in half] == ["", ""]
    assert decoder.flush() == "\ufffd"
    broken = [*half, *tokenizer.encode("🙂!").ids]  # an incomplete character does not swallow the next
    assert "".join(map(decoder.push, broken)) == "\ufffd🙂!"


def test_separator_in_a_text_is_plain_text(tokenizer):
    separator = tokenizer.token_to_id(SEPARATOR)
    assert separator == 0 and separator not in tokenizer.encode(f"a{SEPARATOR}b").ids
    assert StreamDecoder(tokenizer).push(separator) == SEPARATOR
    assert StreamDecoder(tokenizer).push(10**6) == ""


def test_broken_tokenizer_files(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(path)
    for content in (b"", b"{}", b"\xff\xff", tokenizer.to_str().encode()[:100]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    words = json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    with pytest.raises(InputError, match="byte-level"):
        StreamDecoder(parse_tokenizer(words))


# -------------------------------------------------------------------------------------------------------- token files


def test_token_files_hold_the_text(data, texts):
    corpus = prepare_corpus(data)
    train, val = split_documents(find_documents(data.paths), data.val_fraction)
    for ids, documents in ((corpus.train, train), (corpus.val, val)):
        assert ids.dtype == np.uint16 and ids.max() < corpus.vocab_size <= data.vocab_size
        whole = "".join("".join(document.pieces()) + SEPARATOR for document in documents)
        assert corpus.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == whole
        assert (ids == 0).sum() == len(documents)
    assert corpus.header["tokens"] == {"train": len(corpus.train), "val": len(corpus.val)}


def test_tokenizer_is_trained_on_the_training_split_alone(tmp_path):
    folder = write_texts(tmp_path / "texts", 12)
    data = DataSettings(paths=(str(folder),), vocab_size=400, val_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    _, val = split_documents(find_documents(data.paths), data.val_fraction)
    before = prepare_corpus(data).tokenizer.to_str()
    val[0].path.write_text("zyxwv " * 500)
    assert prepare_corpus(data).tokenizer.to_str() == before


def test_large_vocabularies_take_four_bytes(data, monkeypatch):
    small = prepare_corpus(data)
    monkeypatch.setattr("tokenizers.Tokenizer.get_vocab_size", lambda self: 70000, raising=False)
    large = prepare_corpus(DataSettings(**{**data.__dict__, "cache_dir": data.cache_dir + "2"}))
    assert large.train.dtype == np.uint32 and np.array_equal(large.train, small.train)


def test_cache_is_reused_and_follows_the_text(tmp_path):
    folder = write_texts(tmp_path / "texts", 6)
    data = DataSettings(paths=(str(folder),), vocab_size=300, cache_dir=str(tmp_path / "cache"))
    said = []
    first = prepare_corpus(data, said.append)
    again = prepare_corpus(data, said.append)
    assert len(said) == 1 and again.fingerprint == first.fingerprint
    assert [path.name[0] for path in Path(data.cache_dir).iterdir()] != ["."]  # nothing left over
    path = next(folder.rglob("*.txt"))
    path.write_text(path.read_text().replace("e", "a", 1))
    changed = prepare_corpus(data, said.append)
    assert len(said) == 2 and changed.fingerprint != first.fingerprint
    prepare_corpus(DataSettings(**{**data.__dict__, "vocab_size": 301}), said.append)
    assert len(said) == 3


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "header.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "empty"])
def test_damaged_token_files_are_made_anew(data, name, damage):
    first = prepare_corpus(data)
    path = cache_folder(data) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-2])
    elif damage == "altered":
        path.write_bytes(content.replace(b"s", b"\x00") if name.endswith("json") else content[:-1] + b"\xff")
    elif damage == "empty":
        path.touch()
    with pytest.raises(CorruptCache, match=cache_folder(data).name):
        open_corpus(cache_folder(data))
    said = []
    again = prepare_corpus(data, said.append)
    assert again.fingerprint == first.fingerprint and "anew" in said[0]


def test_header_of_another_kind_is_refused(data):
    prepare_corpus(data)
    path = cache_folder(data) / "header.json"
    header = json.loads(path.read_text())
    for change in ({"format": 99}, {"dtype": "no"}, {"checksums": []}, {"checksums": {}}):
        path.write_text(json.dumps({**header, **change}))
        with pytest.raises(CorruptCache):
            open_corpus(path.parent)


def test_two_at_once(data):
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(prepare_corpus, [data] * 3)
    assert all(other.fingerprint == first.fingerprint for other in others)
    assert len(list(Path(data.cache_dir).iterdir())) == 1


def test_unwritable_cache_is_an_error(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache_dir"):
        prepare_corpus(DataSettings(**{**data.__dict__, "cache_dir": str(tmp_path / "file" / "cache")}))


# ------------------------------------------------------------------------------------------------------------ batches


@given(tokens=st.integers(9, 200), block=st.integers(1, 8), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_window_once(tokens, block, seed):
    batches = Batches(np.arange(tokens, dtype=np.uint16), block, seed)
    inputs, targets = batches(0, batches.windows)
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (batches.windows, block)
    assert torch.equal(inputs + 1, targets)
    assert len(inputs.unique()) == inputs.numel() and targets.max() < tokens
    assert batches.windows >= max(1, (tokens - 1) // block - 1)


def test_order_depends_on_seed_and_number_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    batches, other = Batches(tokens, 8, 1), Batches(tokens, 8, 2)
    whole = [batches(n, 1)[0] for n in range(3 * batches.windows)]
    for first, count in ((250, 7), (0, 5), (120, 10)):  # any order of calls, across epochs
        assert torch.equal(batches(first, count)[0], torch.cat(whole[first : first + count]))
    assert torch.equal(Batches(tokens, 8, 1)(200, 3)[0], torch.cat(whole[200:203]))
    assert not torch.equal(other(0, 20)[0], torch.cat(whole[:20]))
    assert not torch.equal(torch.cat(whole[: batches.windows]), torch.cat(whole[batches.windows : 2 * batches.windows]))


@pytest.mark.parametrize(("tokens", "batch", "batches", "shapes"), [
    (1000, 4, 3, [4, 4, 4]),
    (33, 4, 3, [4, 4]),
    (17, 4, 3, [4]),
    (16, 4, 3, [3]),
    (5, 4, 3, [1]),
])  # fmt: skip
def test_held_out_batches(tokens, batch, batches, shapes):
    made = held_out_batches(np.arange(tokens, dtype=np.uint16), 4, batch, batches)
    assert [len(inputs) for inputs, _ in made] == shapes
    inputs = torch.cat([inputs for inputs, _ in made])
    assert len(inputs.unique()) == inputs.numel()
    assert inputs.max() >= (tokens - 1) * (1 - 1 / len(inputs)) - 4  # spread to the end


def test_too_little_text():
    tokens = np.arange(8, dtype=np.uint16)
    for make in (lambda: Batches(tokens, 8, 0), lambda: held_out_batches(tokens, 8, 1, 1)):
        with pytest.raises(InputError, match=r"8 tokens.*block_size 8"):
            make()
