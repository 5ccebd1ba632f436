"""Token files and batches."""

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
from muddformer.inference.tokenizer import SEPARATOR
from muddformer.training.corpus import find_documents, split_documents
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


# -------------------------------------------------------------------------------------------------------- token files


def test_token_files_hold_the_text(data, texts):
    corpus = prepare_corpus(data)
    train, val = split_documents(find_documents(data.paths), data.val_fraction)
    for ids, documents in ((corpus.train, train), (corpus.val, val)):
        assert ids.dtype == np.uint16 and ids.max() < corpus.vocab_size <= data.vocab_size
        whole = "".join(SEPARATOR if piece is None else piece for document in documents for piece in document.pieces())
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

    def made() -> int:
        return sum("tokenizing" in line for line in said)

    first = prepare_corpus(data, said.append)
    again = prepare_corpus(data, said.append)
    assert made() == 1 and again.fingerprint == first.fingerprint
    assert [path.name[0] for path in Path(data.cache_dir).iterdir()] != ["."]  # nothing left over
    path = next(folder.rglob("*.txt"))
    path.write_text(path.read_text().replace("e", "a", 1))
    changed = prepare_corpus(data, said.append)
    assert made() == 2 and changed.fingerprint != first.fingerprint
    prepare_corpus(DataSettings(**{**data.__dict__, "vocab_size": 301}), said.append)
    assert made() == 3


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
