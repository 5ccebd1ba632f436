"""``muddformer inspect``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muddformer._files import write_atomically
from muddformer.cli.options import number
from muddformer.cli.texts import add_text_options, read_texts
from muddformer.errors import InputError
from muddformer.inference.inspection import Inspection, inspect_model
from muddformer.inference.loading import find_checkpoints, find_device, load_model, resolve_checkpoint
from muddformer.inference.tokenizer import load_tokenizer
from muddformer.models import MUDDFormer
from muddformer.plots import plot_connection_weights, plot_history_norms, plot_similarities, plot_sinks
from muddformer.training.data import held_out_batches, prepare_corpus
from muddformer.training.loop import load_run_settings
from muddformer.training.metrics import say

HELP = "what the connections of a trained model do: weights, likeness of streams, attention sinks, norms"


def add_options(inspect: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    option = inspect.add_argument
    option("folder", metavar="DIR", help="a run, whose held-out text is read; or a checkpoint, with --text")
    add_text_options(inspect, "text files and folders to read in place of the run's held-out text")
    option("--tokens", type=number(int, 2), default=16384, metavar="N", help="at most so many (default: %(default)s)")
    option("--output", metavar="DIR", help="where inspection.json and the pictures go (default: DIR/inspection)")
    option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measures, writes the numbers and pictures, and prints a table."""
    folder, device = Path(options.folder), find_device(options.device)
    checkpoint = resolve_checkpoint(folder)
    model = _load(checkpoint, device)
    batches = _batches(folder, checkpoint, model, options)
    inspection = inspect_model(model, batches)
    norms = {}
    for older in [] if checkpoint == folder else find_checkpoints(folder)[:-1]:
        say(f"reading {older.name}")
        norms[older.name] = inspect_model(_load(older, device), batches[:1]).history_rms.tolist()
    norms[checkpoint.name] = inspection.history_rms.tolist()
    output = Path(options.output) if options.output else folder / "inspection"
    output.mkdir(parents=True, exist_ok=True)
    tokens = sum(ids.numel() for ids in batches)
    text = json.dumps(
        {"checkpoint": str(checkpoint), "tokens": tokens, **inspection.to_dict(), "norms": norms}, indent=1
    )
    write_atomically(output / "inspection.json", lambda path: path.write_text(text, encoding="utf-8"))
    _draw(inspection, norms, output)
    print(_table(inspection))
    say(f"{tokens:,} tokens; numbers and pictures are in {output}")
    return 0


def _load(checkpoint: Path, device: torch.device) -> MUDDFormer:
    model = load_model(checkpoint)
    if not isinstance(model, MUDDFormer):
        raise InputError(f"{str(checkpoint)!r} holds a {type(model).__name__}: only a MUDDFormer can be inspected")
    return model.to(device)


def _batches(folder: Path, checkpoint: Path, model: MUDDFormer, options: argparse.Namespace) -> Sequence[Tensor]:
    """Token ids [1, T], of which one fits into memory at a time."""
    if not options.text and checkpoint == folder:
        raise InputError(f"{str(folder)!r} is a checkpoint, not a run with a held-out text: give text with --text")
    if not options.text:
        ids = prepare_corpus(load_run_settings(folder).data, say).val
    else:
        tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
        texts = ("".join(pieces) for _, pieces in read_texts(options))
        ids = np.array([i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids], np.int64)
    length = min(model.config.block_size, options.tokens, len(ids) - 1)
    if length < 2:
        raise InputError(f"the text has {len(ids)} tokens, too few to look at: at least 3 are needed")
    return [inputs for inputs, _ in held_out_batches(ids, length, 1, max(1, options.tokens // length))]


def _draw(inspection: Inspection, norms: dict[str, list[float]], output: Path) -> None:
    if inspection.plan:
        plot_connection_weights(
            inspection.weight_means, inspection.weight_stds, inspection.plan, inspection.ways, output / "weights.png"
        )
    plot_similarities(inspection.similarities, output / "similarities.png", "cosine similarity between blocks")
    plot_sinks({"this model": inspection.sinks}, output / "sinks.png")
    plot_history_norms(norms, output / "norms.png")


def _table(inspection: Inspection) -> str:
    """A line for each block: likeness to the block before, attention to the first token, norm of what it returns."""
    lines = ["block  like the block before: q      k      v      x   first token   norm of X"]
    for i in range(len(inspection.sinks)):
        alike = "".join(
            f"{inspection.similarities[name][i, i - 1].item():7.3f}" if i else f"{'-':>7}" for name in "qkvx"
        )
        sink, norm = inspection.sinks[i].mean().item(), inspection.history_rms[i + 1].item()
        lines.append(f"{i:>5}{'':21}{alike}{sink:13.1%}{norm:12.4g}")
    return "\n".join(lines)
