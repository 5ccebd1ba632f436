"""The demonstration: a MUDD model and its plain twin on the same tokens in the same order, within a time budget."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import Diverged, InputError
from ..inference.text import stream_text
from ..plots import plot_losses
from .data import prepare_corpus
from .loop import Trainer
from .metrics import Row, read_metrics, say
from .settings import Settings, load_preset

__all__ = ["Measured", "run_demo"]

_MODELS = {"plain": False, "MUDD": True}  # name: model.dense
_PROMPT = "class Queue:\n    def __init__(self"
_SAMPLE_TOKENS = 160
_START_SECONDS = 10.0  # allowance for the start of each run and its checkpoint
_REPORT_SECONDS = 25.0  # allowance for the text and the picture
_SAFETY = 1.15  # a machine slows down when it gets warm or busy
_FEWEST_STEPS = 100


@dataclass(frozen=True)
class Measured:
    """What the runs of one model gave.

    Attributes:
        model: its name.
        parameters: number of them.
        val_loss: final held-out loss, nats per token, mean of the seeds.
        spread: largest minus smallest final held-out loss of the seeds.
        tokens_per_s: training speed, median over the steps of all seeds.
        memory_mib: largest peak of resident memory (on CUDA: allocated memory) of a training process.
    """

    model: str
    parameters: int
    val_loss: float
    spread: float
    tokens_per_s: float
    memory_mib: float


def run_demo(output: Path, *, minutes: float, seeds: int, overrides: Sequence[str] = ()) -> bool:
    """Trains both models with each seed and writes ``report.md``, ``table.csv``, ``losses.png`` and ``sample.txt``.

    Args:
        output: folder for these and the runs (in ``runs``); an earlier demonstration there is replaced.
        minutes: wall time that all of it may take. On a machine too slow for the preset's steps both models do fewer.
        seeds: runs of each model.
        overrides: ``section.key=value`` on top of the preset ``demo``.

    Returns:
        Whether the MUDD model's mean loss is the lower one, by more than the spread of the seeds.

    Raises:
        InputError: if the time is too short, the folder cannot be used, or a run fails.
    """
    begin = time.monotonic()
    settings = load_preset("demo").override(overrides)
    try:
        (output / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {str(output)!r} as the output folder: {error.strerror}") from error
    corpus = prepare_corpus(settings.data, say)
    say("measuring the time of a step")
    seconds, parameters = {}, {}
    for name, dense in _MODELS.items():
        seconds[name], parameters[name] = _time_steps(settings.override([f"model.dense={str(dense).lower()}"]))
    left = 60 * minutes - (time.monotonic() - begin) - len(_MODELS) * seeds * _START_SECONDS - _REPORT_SECONDS
    steps = _affordable_steps(settings.train.steps, left, seeds * _SAFETY * sum(seconds.values()))

    runs: dict[str, list[list[Row]]] = {name: [] for name in _MODELS}
    for seed in range(seeds):
        for name, dense in _MODELS.items():
            say(f"\n{name} model, seed {seed}: {steps} steps")
            run = output / "runs" / f"{name.lower()}-seed{seed}"
            keys = [f"model.dense={str(dense).lower()}", f"train.steps={steps}", f"train.seed={seed}"]
            _train_apart(settings.override(keys), run)
            runs[name].append(read_metrics(run / "metrics.csv"))
    measured = [_measure(name, parameters[name], runs[name]) for name in _MODELS]

    sample = "".join(stream_text(run, _PROMPT, max_new_tokens=_SAMPLE_TOKENS, temperature=0.7, top_k=50, seed=0))
    title = f"{settings.model['n_layer']} layers x {settings.model['dim']}, {steps} steps, seeds: {seeds}"
    plot_losses(runs, output / "losses.png", f"MUDD model and its plain twin, same tokens: {title}")
    tokens = f"{runs['MUDD'][0][-1].tokens:,} of {len(corpus.train):,} training tokens"
    facts = f"{title}; {tokens}; threads: {torch.get_num_threads()}, torch {torch.__version__}, {platform.machine()}"
    won, verdict = _verdict(measured)
    _write_report(output, measured, facts, verdict, sample)
    print(
        f"\n{_table(measured)}\n\n{verdict}\n{facts}\n\nText written by the MUDD model after {_PROMPT!r}:\n\n{sample}\n"
    )
    print(f"report.md, losses.png, table.csv, sample.txt and runs/ are in {output} ({time.monotonic() - begin:.0f} s)")
    return won


def _time_steps(settings: Settings) -> tuple[float, int]:
    """Seconds per update, evaluations included, and the number of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, Path(folder))
        times = []
        for work in (trainer.update,) * 10 + (trainer.evaluate,) * 2:
            begin = time.perf_counter()
            work()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    update, evaluation = statistics.median(times[1:10]), min(times[10:])
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return update + evaluation / settings.train.eval_every, parameters


def _affordable_steps(wanted: int, seconds: float, seconds_per_step: float) -> int:
    steps = min(wanted, int(seconds / seconds_per_step))
    if steps < _FEWEST_STEPS:
        raise InputError(f"there is time for {max(steps, 0)} steps, not even {_FEWEST_STEPS}: give more --minutes")
    say(f"{steps} steps of both models should take {steps * seconds_per_step / 60:.1f} minutes")
    if steps < wanted:
        say(f"(this machine is too slow for the preset's {wanted} steps in the time given)")
    return steps


def _train_apart(settings: Settings, run: Path) -> None:
    """A run in a process of its own: its peak memory is its own too."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(settings, run))
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(f"the run {str(run)!r} ended with exit code {process.exitcode}")


def _train(settings: Settings, run: Path) -> None:
    try:
        finished = Trainer(settings, run, overwrite=True).fit().finished
    except (InputError, Diverged) as error:
        sys.exit(str(error))
    if not finished:
        sys.exit("interrupted")


def _measure(model: str, parameters: int, seeds: Sequence[Sequence[Row]]) -> Measured:
    finals = [rows[-1].val_loss for rows in seeds]
    return Measured(
        model=model,
        parameters=parameters,
        val_loss=statistics.mean(finals),
        spread=max(finals) - min(finals),
        tokens_per_s=statistics.median(row.tokens_per_s for rows in seeds for row in rows),
        memory_mib=max(row.memory_mib for rows in seeds for row in rows),
    )


def _verdict(measured: Sequence[Measured]) -> tuple[bool, str]:
    plain, mudd = measured
    gain, spread = plain.val_loss - mudd.val_loss, max(plain.spread, mudd.spread)
    won = gain > spread
    text = (
        f"Held-out loss {mudd.val_loss:.3f} with MUDD connections, {plain.val_loss:.3f} without: "
        f"{abs(gain):.3f} nats per token {'lower' if gain > 0 else 'higher'}, seeds differ by at most {spread:.3f}. "
        f"The MUDD model has {mudd.parameters / plain.parameters - 1:.1%} more parameters and trains at "
        f"{mudd.tokens_per_s / plain.tokens_per_s:.0%} of the speed."
    )
    return won, text if won else f"{text} This run does not show an advantage."


def _table(measured: Sequence[Measured]) -> str:
    lines = ["| model | parameters | held-out loss, nats | spread of seeds | tokens/s | peak memory, MiB |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for row in measured:
        cells = (row.model, f"{row.parameters:,}", f"{row.val_loss:.3f}", f"{row.spread:.3f}")
        lines.append(f"| {' | '.join(cells)} | {row.tokens_per_s:,.0f} | {row.memory_mib:,.0f} |")
    return "\n".join(lines)


def _write_report(output: Path, measured: Sequence[Measured], facts: str, verdict: str, sample: str) -> None:
    with (output / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Measured)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in measured)
    (output / "sample.txt").write_text(f"{_PROMPT}{sample}\n", encoding="utf-8")
    fence = "`" * 4
    report = (
        f"# A MUDD model and its plain twin\n\n{verdict}\n\n{_table(measured)}\n\n{facts}\n\n"
        "Both models saw the same tokens in the same order and differ in the connections alone. Memory is the peak of "
        "the training process, Python and torch included (on CUDA: what torch allocated there).\n\n"
        "![held-out loss over training tokens](losses.png)\n\n"
        f"## Text written by the MUDD model\n\n{fence}\n{_PROMPT}{sample}\n{fence}\n"
    )
    (output / "report.md").write_text(report, encoding="utf-8")
