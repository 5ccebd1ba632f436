"""``muddformer eval``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from muddformer._files import write_atomically
from muddformer.cli.options import add_dtype_option, chosen_dtype, number
from muddformer.cli.progress import Progress
from muddformer.cli.texts import add_text_options, read_texts
from muddformer.errors import InputError
from muddformer.inference.harness import harness_model
from muddformer.inference.loading import load_model_and_tokenizer, resolve_checkpoint
from muddformer.inference.scoring import TextScore, score_texts
from muddformer.inference.tasks import TaskFigure, run_tasks
from muddformer.utils import build_info

HELP = "perplexity of a model over text files, and tasks of lm-evaluation-harness"

_MOST_LINES = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    option = parser.add_argument
    default = "(default: %(default)s)"
    count = number(int, 1)
    option(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint with tokenizer.json, or a run: its newest one"
    )
    add_text_options(parser, "text files and folders: their perplexity")
    option("--window", type=count, metavar="N", help="tokens that the model reads at once (default: its block_size)")
    option("--stride", type=count, metavar="N", help="tokens scored in each window (default: half of --window)")
    option(
        "--tasks", nargs="+", default=[], metavar="TASK", help="names or .yaml files of lm-evaluation-harness's tasks"
    )
    option("--task-folder", action="append", default=[], metavar="DIR", help="more .yaml files of tasks; repeatable")
    option("--shots", type=number(int, 0), metavar="N", help="examples before each question (default: the task's)")
    option("--limit", type=count, metavar="N", help="questions of each task, for a try (default: all)")
    option("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help=f"of examples and sampling {default}")
    option(
        "--batch-size", type=count, default=8, metavar="N", help=f"sequences at once; results are the same {default}"
    )
    add_dtype_option(parser, "of the parameters")
    option("--device", default="auto", metavar="NAME", help=f"auto, cpu, cuda or cuda:N {default}")
    option("--output", metavar="FILE", help="write everything to this file too, as JSON")


def run(options: argparse.Namespace) -> int:
    """Prints tables and writes JSON."""
    if not (options.text or options.tasks):
        raise InputError("there is nothing to do: give --text, --tasks or both")
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise InputError(f"--output {options.output!r} is in a folder that is not there")
    folder = resolve_checkpoint(Path(options.checkpoint))
    model, tokenizer = load_model_and_tokenizer(folder, options.device, chosen_dtype(options))
    report = {
        "checkpoint": str(folder),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": build_info(),
    }
    try:
        if options.text:
            report["perplexity"] = _texts(options, model, tokenizer)
        if options.tasks:
            report["tasks"] = _tasks(options, model, tokenizer)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if options.output is not None:
        text = json.dumps(report, indent=2) + "\n"
        write_atomically(Path(options.output), lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def _texts(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    texts = read_texts(options)
    window = options.window or model.config.block_size
    with Progress("scoring") as progress:
        scores = score_texts(
            model,
            tokenizer,
            texts,
            window=window,
            stride=options.stride,
            batch_size=options.batch_size,
            progress=progress.update,
        )
    total = TextScore(
        name="total",
        tokens=sum(score.tokens for score in scores),
        bytes=sum(score.bytes for score in scores),
        nats=sum(score.nats for score in scores),
    )
    lines = [
        (
            score.name,
            f"{score.tokens:,}",
            f"{score.bytes:,}",
            f"{score.nats_per_token:.4f}",
            f"{score.perplexity:.4f}",
            f"{score.bits_per_byte:.4f}",
        )
        for score in [*(scores if len(scores) <= _MOST_LINES else ()), total]
    ]
    _print_table(("text", "tokens", "bytes", "nats per token", "perplexity", "bits per byte"), lines)
    stride = options.stride or max(1, window // 2)
    files = [score.to_dict() for score in scores]
    return {"window": window, "stride": stride, "total": total.to_dict(), "files": files}


def _tasks(options: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    figures = run_tasks(
        harness_model(model, tokenizer, batch_size=options.batch_size, seed=options.seed),
        options.tasks,
        folders=[Path(folder) for folder in options.task_folder],
        shots=options.shots,
        limit=options.limit,
        seed=options.seed,
    )
    lines = [
        [
            *("-" if cell is None else str(cell) for cell in figure[:-2]),
            f"{figure.value:.4f}",
            "-" if figure.stderr is None else f"{figure.stderr:.4f}",
        ]
        for figure in figures
    ]
    _print_table((*TaskFigure._fields[:-1], "standard error"), lines)
    return [figure._asdict() for figure in figures]


def _print_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
