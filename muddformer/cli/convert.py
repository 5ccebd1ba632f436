"""``muddformer convert``."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from muddformer.cli.options import add_dtype_option, chosen_dtype, number
from muddformer.cli.progress import Progress
from muddformer.errors import InputError
from muddformer.inference.loading import check_vocabulary, resolve_checkpoint
from muddformer.inference.tokenizer import load_tokenizer
from muddformer.models.convert import LAYOUTS, convert, read_source_config

HELP = "make a checkpoint directory of another one, of the public release, or of a GPT-NeoX or Llama model"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    option = parser.add_argument
    default = "(default: %(default)s)"
    option("source", metavar="SRC", help="directory with config.json and safetensors or pytorch_model.bin; or a run")
    option("target", metavar="DST", help="directory to make; called again after an interruption, the command goes on")
    option("--to", choices=tuple(LAYOUTS), default="muddformer", help=f"layout: hf is read by transformers {default}")
    option("--mudd", action="store_true", help="give a plain model fresh MUDD connections: it computes the same")
    help = "with --mudd: an option of the connections, such as pre_norm=true; repeatable"
    option("--set", action="append", default=[], metavar="KEY=VALUE", help=help)
    add_dtype_option(parser, "of the weights that are written")
    option("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help=f"of each file {default}")
    option("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help=f"of fresh connections {default}")


def run(options: argparse.Namespace) -> int:
    """Converts, or goes on with a conversion."""
    if options.set and not options.mudd:
        raise InputError("--set is for the connections that --mudd gives a model")
    connections = dict(map(_assignment, options.set)) if options.mudd else None
    source = Path(options.source)
    if not (source / "config.json").is_file() and source.is_dir():
        source = resolve_checkpoint(source)
    try:
        config = read_source_config(source)
        if (source / "tokenizer.json").is_file():
            check_vocabulary(load_tokenizer(source / "tokenizer.json"), config.vocab_size, source)
        with Progress("converting") as progress:
            convert(
                source,
                options.target,
                layout=options.to,
                connections=connections,
                dtype=chosen_dtype(options),
                max_shard_bytes=options.max_shard_size,
                seed=options.seed,
                progress=progress.update,
            )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"{source} -> {options.target}")
    return 0


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--set must be KEY=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:  # a text as it stands
        return name, value


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB or 500MB")
    return int(size)
