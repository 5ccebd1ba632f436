"""Metrics of a run: one row per update in a CSV file and for TensorBoard, and progress for people."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._files import naming, write_atomically
from ..errors import InputError, require
from ..inference.inspection import Inspection

__all__ = ["MetricsFile", "Progress", "Row", "TensorBoard", "peak_memory_mib", "read_metrics", "say"]


@dataclass
class Row:
    """Metrics of one update.

    Attributes:
        step: number of the update, from 1.
        tokens: tokens trained on so far.
        loss: mean cross-entropy of the update's batches, nats per token.
        val_loss: the same on held-out text, where it was evaluated.
        learning_rate: of this update.
        grad_norm: before clipping.
        tokens_per_s: mean since the previous line of progress, without evaluation and checkpoints.
        memory_mib: peak so far, see :func:`peak_memory_mib`.
    """

    step: int
    tokens: int
    loss: float
    val_loss: float | None
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    memory_mib: float


_COLUMNS = [field.name for field in dataclasses.fields(Row)]


class MetricsFile:
    """``metrics.csv``: rows in order of their steps, each step once, over any number of resumed runs.

    Args:
        path: the file. Rows after ``last_step`` are dropped: the run was killed after it wrote them, and repeats them.
        last_step: update that the run continues from; 0 empties the file.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        rows, self._path = _rows_until(path, last_step), path

        def begin(scratch: Path) -> None:
            with scratch.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(_COLUMNS)
                self._write(file, rows)

        write_atomically(path, begin)
        self._file = path.open("a", newline="", encoding="utf-8")

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows."""
        with naming(self._path):
            self._write(self._file, rows)
            self._file.flush()

    def sync(self) -> None:
        """Returns when the rows are on the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with naming(self._path):
            self._file.close()

    @staticmethod
    def _write(file: Any, rows: Sequence[Row]) -> None:
        # repr of a float reads back as the same number
        values = ([getattr(row, name) for name in _COLUMNS] for row in rows)
        csv.writer(file, lineterminator="\n").writerows(["" if v is None else repr(v) for v in row] for row in values)


def _rows_until(path: Path, last_step: int) -> list[Row]:
    """Rows of the steps until the one that a run is resumed from. What is lost is said, and is no reason to stop."""
    if last_step == 0:
        return []
    try:
        by_step = {row.step: row for row in read_metrics(path) if 1 <= row.step <= last_step}
    except InputError as error:
        say(f"{error}; the rows of steps 1 to {last_step} are lost")
        return []
    if len(by_step) < last_step:
        say(f"{path} lacks {last_step - len(by_step)} of the rows of steps 1 to {last_step}")
    return [by_step[step] for step in sorted(by_step)]


def read_metrics(path: Path) -> list[Row]:
    """Rows of a ``metrics.csv`` up to the first incomplete one.

    Raises:
        InputError: if the file is missing or is none of ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not lines or lines[0] != _COLUMNS:
        raise InputError(f"{path} has other columns than {', '.join(_COLUMNS)}")
    rows = []
    for line in lines[1:]:
        try:
            step, tokens, *others = line
            loss, val_loss, rate, norm, speed, memory = (float(text) if text else None for text in others)
            rows.append(Row(int(step), int(tokens), loss, val_loss, rate, norm, speed, memory))
        except ValueError:
            break
    return rows


class TensorBoard:
    """Writes the same rows as TensorBoard events; those after ``last_step`` of an earlier run are hidden."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self._folder = folder
        with naming(folder):
            self._writer = require("torch.utils.tensorboard").SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows."""
        for row in rows:
            for name, value in dataclasses.asdict(row).items():
                if name not in ("step", "tokens") and value is not None:
                    self._add(name, value, row.step)

    def write_inspection(self, inspection: Inspection, step: int) -> None:
        """Adds what the connections do: norms of the hidden states X_i, attention to the first token by block, and by
        aggregation and way the sum of the absolute mean weights of all sources but the newest.
        """
        scalars = {f"history_rms/X_{i}": x for i, x in enumerate(inspection.history_rms.tolist())}
        scalars |= {f"first_token/block_{i}": x for i, x in enumerate(inspection.sinks.mean(1).tolist())}
        for i, means in inspection.weight_means.items():
            older = means[:, :-1].abs().sum(1).tolist()
            scalars |= {f"older_sources/{i}_{way}": x for way, x in zip(inspection.ways[i], older, strict=True)}
        for name, value in scalars.items():
            self._add(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        with naming(self._folder):
            self._writer.close()

    def _add(self, name: str, value: float, step: int) -> None:
        with naming(self._folder):
            self._writer.add_scalar(name, value, step)


class Progress:
    """Progress on stderr: a bar of ``rich`` on a terminal, else a line whenever there is news.

    Args:
        steps: updates of the whole run.
        done: updates done before.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._first = done
        self._begin = time.monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty():
            rich = require("rich.progress")
            console = require("rich.console").Console(stderr=True)
            columns = ("{task.description}", rich.BarColumn(), rich.TextColumn("{task.fields[news]}", markup=False))
            self._bar = rich.Progress(*columns, rich.TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("training", total=steps, completed=done, news="")
            self._bar.start()

    def update(self, row: Row) -> None:
        """Shows the newest row."""
        news = f"step {row.step}/{self._steps}  loss {row.loss:.4f}"
        news += "" if row.val_loss is None else f"  held-out loss {row.val_loss:.4f}"
        news += f"  {row.tokens_per_s:,.0f} tokens/s"
        if self._bar is None:
            left = (time.monotonic() - self._begin) / (row.step - self._first) * (self._steps - row.step)
            say(f"{news}  {_duration(left)} left")
        elif row.val_loss is not None:
            self._bar.console.print(news, markup=False, highlight=False)
        if self._bar is not None:
            self._bar.update(self._task, completed=row.step, news=news)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: on CUDA what torch has allocated there, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # on Linux getrusage counts the parent process too
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return float("nan")


def say(text: str) -> None:
    """Tells people on stderr, which keeps stdout for results."""
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
