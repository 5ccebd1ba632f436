"""The tokenizer, token by token, and its files."""

from __future__ import annotations

import json

import pytest
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
