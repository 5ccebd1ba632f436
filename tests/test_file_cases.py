"""Files that Python and C++ take alike (tests/cpp/file_cases_test.cpp): which are read, and which refused."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.paths import TESTS
from muddformer.inference.tokenizer import StreamDecoder, load_tokenizer
from muddformer.models import load_config
from muddformer.models.stored import open_tensors

CASES = json.loads((TESTS / "file_cases.json").read_text(encoding="utf-8"))


def read_header(folder: Path, text: bytes) -> None:
    (folder / "file.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with open_tensors(folder / "file.safetensors"):
        pass


def read_config(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    load_config(folder)


def read_tokenizer(folder: Path, text: bytes) -> None:
    pytest.importorskip("tokenizers")
    (folder / "tokenizer.json").write_bytes(text)
    StreamDecoder(load_tokenizer(folder / "tokenizer.json"))


READERS = {"header": read_header, "config": read_config, "tokenizer": read_tokenizer}


@pytest.mark.parametrize("kind", READERS)
def test_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    for case in CASES[kind]:
        message = None
        try:
            READERS[kind](tmp_path, case["text"].encode())
        except ValueError as error:
            message = str(error)
        assert (message is None) == case["read"], f"{case['case']}: {message}"
        assert message is None or len(message) < 1000


def test_many_names_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_file({f"layers.{number}": torch.empty(0) for number in range(40_000)}, path)
    begin = time.perf_counter()
    with open_tensors(path) as tensors:
        assert len(tensors) == 40_000
    assert time.perf_counter() - begin < 10


def test_messages_are_bounded(tmp_path: Path) -> None:
    name = "x" * 100_000
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    long_entries = (
        f'{{"{name}":3}}',
        f'{{"{name}":{entry},"{name}":{entry}}}',
        f'{{"{name}',
        f'{{"a":{{"dtype":"{name}"}}}}',
    )
    texts = {
        "header": long_entries,
        "config": (
            f'{{"{name}":3}}',
            f'{{"dim":"{name}"}}',
            f'{{"ways":"{name}"}}',
            f'{{"dim":3,"{name}":1,"{name}":1}}',
        ),
        "tokenizer": (f'{{"{name}":3}}', f'{{"decoder":"{name}"}}', f'{{"model":{{"type":"{name}"}}}}'),
    }
    for kind, read in READERS.items():
        for text in texts[kind]:
            with pytest.raises(ValueError) as caught:
                read(tmp_path, text.encode())
            assert len(str(caught.value)) < 1000
