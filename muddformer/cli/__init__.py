"""The command ``muddformer``: a file for each of its commands, found by its name.

Exit codes: 0 done; 1 the training diverged, or the demo's claim did not hold; 2 something given cannot be used, said in
one line on stderr; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from muddformer._library import __version__
from muddformer.cli import convert, demo, eval, generate, info, inspect, train
from muddformer.errors import Diverged, InputError

__all__ = ["main"]

_MODULES = (train, generate, inspect, info, convert, eval, demo)
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
"""Modules with ``HELP``, ``add_options(parser)`` and ``run(options)``, which returns the exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows "?", no traceback
            stream.reconfigure(errors="replace")
    try:
        options = _make_parser().parse_args(arguments)
        code = options.command(options)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else 2
    except InputError as error:
        print(f"muddformer: error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"muddformer: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("muddformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141
    except OSError as error:  # a full disk, say
        print(f"muddformer: error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="muddformer", description="Multiway Dynamic Dense (MUDD) models: train, generate, compare.")
    parser.add_argument("--version", action="version", version=f"muddformer {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(command)
        command.set_defaults(command=module.run)
    return parser
