"""Text out of files of every kind: encodings, compression, tables, and what is said of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from muddformer.errors import InputError, MissingPackage
from muddformer.inference.tokenizer import train_tokenizer
from muddformer.training.corpus import Document, find_documents, split_documents
from muddformer.training.data import prepare_corpus
from muddformer.training.settings import DataSettings

TEXT = "größe, 密度\nsecond line\n" * 40
TEXTS = ["first\ntext", "größe", "", "third " * 9]
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def read(path: Path, field: str = "text", misread: list[int] | None = None) -> list[str | None]:
    return list(Document("key", path, field=field).pieces(misread))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_say_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    misread: list[int] = []
    assert read(path, misread=misread) == [TEXT, None] and not misread
    assert find_documents([str(tmp_path)])[0].path == path


@pytest.mark.parametrize("mark, encoding", [(b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")])
def test_big_endian(tmp_path: Path, mark: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + TEXT.encode(encoding))
    assert read(path) == [TEXT, None]


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_packed_files_are_read_through(tmp_path: Path, packing: str) -> None:
    pack = PACKERS.get(packing) or pytest.importorskip("zstandard").compress
    path = tmp_path / f"a.txt.{packing}"
    path.write_bytes(pack(TEXT.encode("utf-16")))
    assert read(path) == [TEXT, None]
    rows = tmp_path / f"rows.jsonl.{packing}"
    rows.write_bytes(pack("\n".join(json.dumps({"text": text}) for text in TEXTS).encode()))
    assert read(rows) == [part for text in TEXTS for part in ([text, None] if text else [None])]
    path.write_bytes(pack(TEXT.encode())[:-9])
    with pytest.raises(InputError, match=rf"cannot read .*a\.txt\.{packing}"):
        list(read(path)), find_documents([str(path)])
    path.write_bytes(pack(b"\0\1\2" * 99))
    with pytest.raises(InputError, match=r"left out: 1 not text \(a\.txt"):
        rows.unlink()
        find_documents([str(tmp_path)])


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4, 5]}), path)
    assert read(path) == [part for text in [*TEXTS, ""] for part in ([text, None] if text else [None])]
    with pytest.raises(InputError, match=r"no field 'body' \(data\.text_field, --text-field\); it has 'text', 'n'"):
        read(path, "body")
    with pytest.raises(InputError, match="holds a int, not a text"):
        read(path, "n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        read(path)


def test_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for row, match in {
        '{"text": ': "line 2: not valid JSON",
        '{"body": 1}': "line 2: no text .*'text'.* it has 'body'",
        "[3]": "line 2: no text",
        '{"text": null}': "line 2: no text",
    }.items():
        path.write_text('{"text": "a"}\n' + row)
        with pytest.raises(InputError, match=match):
            read(path)
    path.write_text('{"body": "a"}\n\n{"body": "\\ud800"}\n')
    assert read(path, "body") == ["a", None, "?", None]


def test_a_packing_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"x")
    with pytest.raises(MissingPackage, match=r"zstandard .* pip install \"muddformer\[data\]\""):
        find_documents([str(tmp_path)])


def test_tables_are_split_between_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [f"text {number}\nin lines" for number in range(20)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (train,), (val,) = split_documents(find_documents([str(path)]), 0.25)
    parts = [list(train.pieces()), list(val.pieces())]
    assert "".join(piece for part in parts for piece in part if piece) == "".join(texts)
    assert all(part and part[-1] is None for part in parts)


def test_what_was_read_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(TEXT)
    (folder / "latin.txt").write_bytes("größe\n".encode("latin-1") * 30)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("x")
    said: list[str] = []
    data = DataSettings(paths=(str(folder),), vocab_size=280, val_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # made, and from the cache
        said.clear()
        prepare_corpus(data, said.append)
        (text,) = (line for line in said if line.startswith("text: 6 files, "))
        assert all(part in text for part in ("1 hidden (.hidden)", "1 empty (empty.txt)", "1 not text (picture.png)"))
        assert any(
            line.startswith("1 files are not UTF-8") and "60 places" in line and "latin.txt" in line for line in said
        )


def test_a_text_without_spaces_takes_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(text: str) -> float:
        begin = time.perf_counter()
        tokenizer = train_tokenizer([text], 600)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        return time.perf_counter() - begin

    seconds("warm up")
    for letters in ("ACGT", " \t", "密度流钥值问残层"):
        text = "".join(random.Random(0).choices(letters, k=100_000))
        assert seconds(text) < 10  # with the square of the length: 20
    monkeypatch.setattr("muddformer.training.data._SECONDS_BETWEEN_NEWS", 0.0)
    (tmp_path / "dna.txt").write_text("".join(random.Random(0).choices("ACGT", k=5 << 19)))
    said: list[str] = []
    paths = (str(tmp_path / "dna.txt"),)
    prepare_corpus(DataSettings(paths=paths, vocab_size=300, cache_dir=str(tmp_path / "cache")), said.append)
    assert any("reading for the tokenizer: 2 MB" in line for line in said)
    assert any(line.startswith("tokenizing train: ") and line.endswith("100%") for line in said)


def test_a_damaged_file_in_a_folder_is_left_out(tmp_path):
    (tmp_path / "whole.txt").write_text("text\n")
    for suffix in ("gz", "bz2", "xz"):
        (tmp_path / f"broken.txt.{suffix}").write_bytes(b"BZh91AY none of these\n" * 9)
    (tmp_path / "table.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "table.parquet").write_bytes(b"no table")
    left_out = {}
    assert [document.path.name for document in find_documents([str(tmp_path)], left_out=left_out)] == ["whole.txt"]
    names = ["broken.txt.bz2", "broken.txt.gz", "broken.txt.xz", "table.jsonl.gz", "table.parquet"]
    assert left_out == {"damaged": names}
    with pytest.raises(InputError, match=r"broken\.txt\.gz"):
        find_documents([str(tmp_path / "broken.txt.gz")])
