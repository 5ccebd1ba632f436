"""Byte-level BPE tokenizers by Hugging Face ``tokenizers``: training, loading and decoding token by token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .._checks import shown
from .._files import parse_json
from ..errors import InputError, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "SEPARATOR",
    "StreamDecoder",
    "end_token",
    "first_token",
    "load_tokenizer",
    "parse_tokenizer",
    "train_tokenizer",
]

SEPARATOR = "<|endoftext|>"
"""Special token that ends a document."""
_FIRST = (SEPARATOR, "<|begin_of_text|>", "<s>", "<bos>")
_LAST = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>")


def train_tokenizer(texts: Iterable[str], vocab_size: int, longest_word: int | None = 128) -> Tokenizer:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens: :data:`SEPARATOR` (id 0), 256 bytes and merges.

    Words are cut at ``longest_word`` characters: training takes time that grows with the square of a word's length, and
    some texts are one word. None: they are not cut.
    """
    tokenizers = require("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if longest_word is not None:
        run = tokenizers.Regex(rf"\S{{{longest_word}}}|\s{{{longest_word}}}")
        cut = tokenizers.pre_tokenizers.Split(run, "isolated")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, tokenizer.pre_tokenizer])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return parse_tokenizer(tokenizer.to_str())


def parse_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from the text of a ``tokenizer.json``. Special tokens spelt out in a text are encoded as plain text.

    Raises:
        InputError: if the text describes no tokenizer.
    """
    try:
        tokenizer = require("tokenizers").Tokenizer.from_str(text)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"not a tokenizer: {shown(error, 300)}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a ``tokenizer.json`` file.

    Raises:
        InputError: if the file is missing or broken.
    """
    try:
        text = path.read_bytes()
        parse_json(text, path)  # by the rules of the C++ library: no key twice, no byte order mark
        return parse_tokenizer(text.decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read tokenizer {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is broken: {error}") from error


def first_token(tokenizer: Tokenizer) -> int | None:
    """The token that a text comes after: what the tokenizer itself puts first, or else one of the usual names."""
    own = tokenizer.encode("").ids
    known = [*own[:1], *(tokenizer.token_to_id(name) for name in _FIRST)]
    return next((token for token in known if token is not None), None)


def end_token(tokenizer: Tokenizer) -> int | None:
    """The token that ends a text, by the usual names."""
    return next((token for token in map(tokenizer.token_to_id, _LAST) if token is not None), None)


class StreamDecoder:
    """Turns token ids into text as they come. A character whose bytes are spread over tokens comes when it is complete.

    Raises:
        InputError: if the tokenizer is not a byte-level BPE.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._verbatim = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        if problem := _not_byte_level(tokenizer, self._verbatim):
            raise InputError(f"text can be streamed with a byte-level BPE tokenizer only, but {problem}")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty. Ids beyond the vocabulary stand for no text."""
        if token in self._verbatim:
            return self._decoder.decode(self._verbatim[token].encode())
        symbols = self._tokenizer.id_to_token(token) or ""
        return self._decoder.decode(bytes(_BYTE_OF_SYMBOL[symbol] for symbol in symbols))

    def flush(self) -> str:
        """What is left of an incomplete last character: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


def _not_byte_level(tokenizer: Tokenizer, verbatim: dict[int, str]) -> str:
    """Why the tokens of a tokenizer are not the bytes of a text, or nothing."""
    tokenizers, model = require("tokenizers"), tokenizer.model
    if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
        return f"its decoder is {shown(tokenizer.decoder)}"
    if not isinstance(model, tokenizers.models.BPE):
        return f"its model is a {type(model).__name__}"
    if mark := model.continuing_subword_prefix or model.end_of_word_suffix:
        return f"its tokens are marked with {shown(mark)}"
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if number not in verbatim and not _BYTE_OF_SYMBOL.keys() >= set(token):
            return f"the token {shown(token)} is not made of bytes"
    return ""


def _byte_symbols() -> dict[str, int]:
    """The printable characters by which byte-level BPE writes the 256 bytes: themselves, or those from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_symbols()
