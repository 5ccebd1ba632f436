"""The command ``muddformer``: train, generate, info and demo.

Exit codes: 0 done; 1 the training diverged, or the demo's claim did not hold; 2 something given cannot be used, said in
one line on stderr; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from muddformer.config import MUDDFormerConfig
from muddformer.training.demo import run_demo
from muddformer.training.errors import Diverged, InputError
from muddformer.training.loop import Trainer, load_run_settings
from muddformer.training.modelling import load_model, make_model, resolve_checkpoint
from muddformer.training.sampling import stream_text
from muddformer.training.settings import DataSettings, Settings, TrainSettings, load_file, load_preset, preset_names
from muddformer.utils import build_info

__all__ = ["main"]


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


def _train(options: argparse.Namespace) -> int:
    if options.resume is not None:
        if options.preset or options.config or options.output or options.overwrite or options.data:
            raise InputError("--resume takes the run as it is: no --preset, --config, --data, --output or --overwrite")
        run = Path(options.resume)
        settings = load_run_settings(run)
    else:
        run = Path(options.output or "run")
        settings = _chosen_settings(options)
    flags = {name: getattr(options, name) for name in ("steps", "seed", "device")}
    sections = {"train": {name: value for name, value in flags.items() if value is not None}}
    if options.data:
        sections["data"] = {"paths": options.data}
    settings = settings.merge(sections).override(options.set)
    result = Trainer(settings, run, resume=options.resume is not None, overwrite=options.overwrite).fit()
    loss = "" if result.val_loss is None else f", held-out loss {result.val_loss:.4f} nats per token"
    print(f"step {result.step}{loss}, checkpoint {result.checkpoint}")
    if not result.finished:
        print(f"muddformer: interrupted; to go on: muddformer train --resume {run}", file=sys.stderr)
        return 130
    return 0


def _generate(options: argparse.Namespace) -> int:
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


def _info(options: argparse.Namespace) -> int:
    if options.checkpoint is not None:
        model = load_model(resolve_checkpoint(Path(options.checkpoint)))
    elif options.preset is not None or options.config is not None:
        settings = _chosen_settings(options)
        with torch.device("meta"):
            model = make_model(settings.model, settings.data.vocab_size)
    else:
        facts = {"python": platform.python_version(), **build_info(), "CPU threads": torch.get_num_threads()}
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.1f} GiB"
            facts[f"cuda:{index}"] = f"{device.name}, {memory}, compute capability {device.major}.{device.minor}"
        if not torch.cuda.is_available():
            facts["CUDA devices"] = "none"
        print("\n".join(f"{name + ':':<18}{value}" for name, value in facts.items()))
        return 0
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
    print(f"config: {json.dumps(model.config.to_dict(), indent=2)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    won = run_demo(Path(options.output), minutes=options.minutes, seeds=options.seeds, overrides=options.set)
    return 0 if won else 1


def _chosen_settings(options: argparse.Namespace) -> Settings:
    if options.config is None:
        return load_preset(options.preset or "demo")
    return load_file(options.config, over=load_preset(options.preset or "demo"))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="muddformer", description="Multiway Dynamic Dense (MUDD) models: train, generate, compare.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        added.set_defaults(command=command)
        return added

    _add_train_options(add("train", _train, "train a model on text files"))
    _add_generate_options(add("generate", _generate, "continue a text with a trained model"))
    info = add("info", _info, "versions, build and devices; or parameters and config of a model")
    _add_source_options(info, "none: versions, build and devices")
    info.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or a run: its newest one")
    _add_demo_options(add("demo", _demo, "train a MUDD model and its plain twin on the same text and compare them"))
    return parser


def _add_train_options(train: argparse.ArgumentParser) -> None:
    train.epilog = _settings_help()
    _add_source_options(train, "demo")
    _add_set_option(train)
    option = train.add_argument
    option("--data", nargs="+", metavar="PATH", help="text files and folders (default: Python's standard library)")
    option("--output", metavar="DIR", help="folder of the run (default: run)")
    option("--overwrite", action="store_true", help="replace a run that is there")
    option("--resume", metavar="DIR", help="continue the run in this folder from its newest checkpoint")
    option("--steps", type=int, metavar="N", help="same as --set train.steps=N: updates of the parameters")
    option("--seed", type=int, metavar="N", help="same as --set train.seed=N")
    option("--device", metavar="NAME", help="same as --set train.device=NAME: auto, cpu, cuda or cuda:N")


def _add_generate_options(generate: argparse.ArgumentParser) -> None:
    option = generate.add_argument
    default = "(default: %(default)s)"
    count, share = _number(int, 1), _number(float, 1e-9, 1)
    option("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run: its newest one")
    option("--prompt", required=True, metavar="TEXT", help="beginning of the text; -: read it from stdin")
    option("--max-new-tokens", type=count, default=200, metavar="N", help=f"length, tokens {default}")
    option("--temperature", type=_number(float, 0), default=0.8, metavar="X", help=f"0: the likeliest token {default}")
    option("--top-k", type=count, metavar="N", help="sample among the N likeliest tokens (default: all)")
    option("--top-p", type=share, metavar="X", help="sample among the likeliest, of total probability X (default: all)")
    option("--seed", type=_number(int, 0, 2**63 - 1), default=0, metavar="N", help=f"seed of the sampling {default}")
    option("--device", default="auto", metavar="NAME", help=f"auto, cpu, cuda or cuda:N {default}")


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    option = demo.add_argument
    default = "(default: %(default)s)"
    option("--output", default="demo", metavar="DIR", help=f"folder of the results {default}")
    option("--minutes", type=_number(float, 0), default=8.0, metavar="X", help=f"longest time, minutes {default}")
    option("--seeds", type=_number(int, 1, 100), default=2, metavar="N", help=f"runs of each model {default}")
    _add_set_option(demo)


def _add_source_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(preset_names())} (default: {default})")
    parser.add_argument("--config", metavar="FILE", help="settings in a .yaml or .toml file, over those of --preset")


def _add_set_option(parser: argparse.ArgumentParser) -> None:
    help = "one setting, over those of preset and config; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=help)


def _settings_help() -> str:
    """The settings with their defaults, from the dataclasses that define them."""
    lines = ["settings of --config and --set (defaults without a preset):"]
    for section, cls in (("data", DataSettings), ("train", TrainSettings)):
        for field in dataclasses.fields(cls):
            default = "none" if field.default == () else json.dumps(field.default).replace("null", "none").strip('"')
            lines.append(f"  {section + '.' + field.name:<24}{field.metadata['help']} ({default})")
    names = ", ".join(field.name for field in dataclasses.fields(MUDDFormerConfig))
    lines += textwrap.wrap(
        f"model.KEY: fields of muddformer.MUDDFormerConfig: {names}. model.vocab_size is the tokenizer's if left out.",
        width=100,
        initial_indent="  ",
        subsequent_indent="  ",
    )
    return "\n".join(lines)


def _number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number in a range."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse
