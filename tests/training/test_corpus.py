"""Which files are the text, and their split."""

from __future__ import annotations

import os

import pytest

from muddformer.errors import InputError
from muddformer.training.corpus import Document, find_documents, split_documents


def keys(documents):
    return [document.key for document in documents]


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


def test_a_file_of_several_names_has_the_first_on_every_disk(tmp_path, monkeypatch):
    root, walk = tmp_path / "root", os.walk
    for name in ("a", "b", "c"):
        (root / name).mkdir(parents=True)
    (root / "b" / "text.txt").write_text("text")
    (root / "a" / "link.txt").symlink_to("../b/text.txt")
    (root / "c" / "link.txt").symlink_to("../b/text.txt")
    for backwards in (False, True):

        def ordered(*args, backwards=backwards, **kwargs):
            for folder, folders, files in walk(*args, **kwargs):
                folders.sort(reverse=backwards)
                yield folder, folders, files

        monkeypatch.setattr(os, "walk", ordered)
        assert keys(find_documents([str(root)])) == ["root/a/link.txt"]


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
    parts = ["".join(filter(None, part.pieces())) for part in (train, val)]
    assert "".join(parts) == text and all(parts)
    assert parts[0].endswith("\n") == ("\n" in text)


def test_pieces_are_whole_lines_and_bad_bytes_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("muddformer.training.text_files._PIECE", 10)
    path = tmp_path / "text"
    path.write_bytes("größe\n".encode() * 5 + b"\xff\xfe\n" + "密".encode())
    *pieces, end = Document("text", path).pieces()
    assert end is None
    assert len(pieces) > 2 and all(piece.endswith("\n") for piece in pieces[:-1])
    assert "".join(pieces) == "größe\n" * 5 + "\ufffd\ufffd\n密"
