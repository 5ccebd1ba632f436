"""Options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from muddformer.training.settings import Settings, load_file, load_preset, preset_names

__all__ = ["add_dtype_option", "add_set_option", "add_source_options", "chosen_dtype", "chosen_settings", "number"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_dtype_option(parser: argparse.ArgumentParser, help: str) -> None:
    """The option ``--dtype``: of what ``help`` says."""
    parser.add_argument("--dtype", choices=_DTYPES, help=f"{help} (default: as they are stored)")


def chosen_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """What ``--dtype`` names."""
    return None if options.dtype is None else getattr(torch, options.dtype)


def add_source_options(parser: argparse.ArgumentParser, default: str) -> None:
    """The options ``--preset`` and ``--config``."""
    parser.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(preset_names())} (default: {default})")
    parser.add_argument("--config", metavar="FILE", help="settings in a .yaml or .toml file, over those of --preset")


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """The option ``--set``."""
    help = "one setting, over those of preset and config; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=help)


def chosen_settings(options: argparse.Namespace) -> Settings:
    """What ``--preset`` and ``--config`` name: the file over the preset, which is ``demo`` if none is named."""
    if options.config is None:
        return load_preset(options.preset or "demo")
    return load_file(options.config, over=load_preset(options.preset or "demo"))


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number in a range."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse
