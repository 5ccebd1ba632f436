"""``muddformer info``."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from muddformer.cli.options import add_source_options, chosen_settings
from muddformer.inference.loading import load_model, resolve_checkpoint
from muddformer.training.modelling import make_model
from muddformer.utils import build_info

HELP = "versions, build and devices; or parameters and config of a model"


def add_options(info: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_source_options(info, "none: versions, build and devices")
    info.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or a run: its newest one")


def run(options: argparse.Namespace) -> int:
    """Prints what is asked for."""
    if options.checkpoint is not None:
        model = load_model(resolve_checkpoint(Path(options.checkpoint)))
    elif options.preset is not None or options.config is not None:
        settings = chosen_settings(options)
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
