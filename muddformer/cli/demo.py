"""``muddformer demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from muddformer.cli.options import add_set_option, number
from muddformer.training.demo import run_demo

HELP = "train a MUDD model and its plain twin on the same text and compare them"


def add_options(demo: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    option = demo.add_argument
    default = "(default: %(default)s)"
    option("--output", default="demo", metavar="DIR", help=f"folder of the results {default}")
    option("--minutes", type=number(float, 0), default=8.0, metavar="X", help=f"longest time, minutes {default}")
    option("--seeds", type=number(int, 1, 100), default=2, metavar="N", help=f"runs of each model {default}")
    add_set_option(demo)


def run(options: argparse.Namespace) -> int:
    """Runs the demonstration; 1 if its claim did not hold."""
    won = run_demo(Path(options.output), minutes=options.minutes, seeds=options.seeds, overrides=options.set)
    return 0 if won else 1
