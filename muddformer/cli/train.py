"""``muddformer train``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from pathlib import Path

from muddformer.cli.options import add_set_option, add_source_options, chosen_settings
from muddformer.errors import InputError
from muddformer.models import MUDDFormerConfig
from muddformer.training.loop import Trainer, load_run_settings
from muddformer.training.settings import DataSettings, TrainSettings

HELP = "train a model on text files"


def add_options(train: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    train.epilog = _settings_help()
    add_source_options(train, "demo")
    add_set_option(train)
    option = train.add_argument
    option("--data", nargs="+", metavar="PATH", help="text files and folders (default: Python's standard library)")
    option("--output", metavar="DIR", help="folder of the run (default: run)")
    option("--overwrite", action="store_true", help="replace a run that is there")
    option("--resume", metavar="DIR", help="continue the run in this folder from its newest checkpoint")
    option("--steps", type=int, metavar="N", help="same as --set train.steps=N: updates of the parameters")
    option("--seed", type=int, metavar="N", help="same as --set train.seed=N")
    option("--device", metavar="NAME", help="same as --set train.device=NAME: auto, cpu, cuda or cuda:N")


def run(options: argparse.Namespace) -> int:
    """Trains, or goes on with a run."""
    if options.resume is not None:
        if options.preset or options.config or options.output or options.overwrite or options.data:
            raise InputError("--resume takes the run as it is: no --preset, --config, --data, --output or --overwrite")
        folder = Path(options.resume)
        settings = load_run_settings(folder)
    else:
        folder = Path(options.output or "run")
        settings = chosen_settings(options)
    flags = {name: getattr(options, name) for name in ("steps", "seed", "device")}
    sections = {"train": {name: value for name, value in flags.items() if value is not None}}
    if options.data:
        sections["data"] = {"paths": options.data}
    settings = settings.merge(sections).override(options.set)
    result = Trainer(settings, folder, resume=options.resume is not None, overwrite=options.overwrite).fit()
    loss = "" if result.val_loss is None else f", held-out loss {result.val_loss:.4f} nats per token"
    print(f"step {result.step}{loss}, checkpoint {result.checkpoint}")
    if not result.finished:
        print(f"muddformer: interrupted; to go on: muddformer train --resume {folder}", file=sys.stderr)
        return 130
    return 0


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
