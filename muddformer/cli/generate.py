"""``muddformer generate``."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from muddformer.cli.options import number
from muddformer.errors import InputError
from muddformer.inference.text import stream_text

HELP = "continue a text with a trained model"


def add_options(generate: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    option = generate.add_argument
    default = "(default: %(default)s)"
    count, share = number(int, 1), number(float, 1e-9, 1)
    option("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run: its newest one")
    option("--prompt", required=True, metavar="TEXT", help="beginning of the text; -: read it from stdin")
    option("--max-new-tokens", type=count, default=200, metavar="N", help=f"length, tokens {default}")
    option("--temperature", type=number(float, 0), default=0.8, metavar="X", help=f"0: the likeliest token {default}")
    option("--top-k", type=count, metavar="N", help="sample among the N likeliest tokens (default: all)")
    option("--top-p", type=share, metavar="X", help="sample among the likeliest, of total probability X (default: all)")
    option("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help=f"seed of the sampling {default}")
    option("--device", default="auto", metavar="NAME", help=f"auto, cpu, cuda or cuda:N {default}")


def run(options: argparse.Namespace) -> int:
    """Prints the prompt and its continuation as it is made."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError("--prompt must be text in the encoding of the terminal, UTF-8 as a rule")
    pieces = stream_text(
        Path(options.checkpoint),
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        device=options.device,
    )
    for piece in itertools.chain([prompt], pieces):
        print(piece, end="", flush=True)
    print()
    return 0
