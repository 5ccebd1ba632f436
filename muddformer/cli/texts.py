"""The options that name texts to read, and what is said of these texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from muddformer.training.corpus import find_documents, report_misread, told
from muddformer.training.metrics import say

__all__ = ["add_text_options", "read_texts"]


def add_text_options(parser: argparse.ArgumentParser, help: str) -> None:
    """The options ``--text``, ``--pattern`` and ``--text-field``."""
    option, default = parser.add_argument, "(default: %(default)s)"
    option("--text", nargs="+", default=[], metavar="PATH", help=help)
    option("--pattern", default="*", metavar="GLOB", help=f"names of the files in folders of --text {default}")
    option(
        "--text-field", default="text", metavar="NAME", help=f"of .jsonl and .parquet files: has the texts {default}"
    )


def read_texts(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The texts that the options name, each with a name and in pieces.

    Says at once which files are read and which are left out, and at the end which were not UTF-8.

    Raises:
        InputError: at once, if there are none, or a path cannot be used.
    """
    left_out: dict[str, list[str]] = {}
    documents = find_documents(options.text, options.pattern, options.text_field, left_out)
    say(f"text: {len(documents):,} files{told(left_out)}")

    def texts() -> Iterator[tuple[str, list[str]]]:
        misread = {}
        for document in documents:
            counts: list[int] = []
            yield from document.texts(counts)
            if counts:
                misread[document.key] = sum(counts)
        if misread:
            say(report_misread(misread))

    return texts()
