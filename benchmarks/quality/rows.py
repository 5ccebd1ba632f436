"""The rows of all runs: one CSV file, a row for each evaluation."""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from muddformer.errors import InputError

__all__ = ["Row", "append_row", "read_rows", "write_rows"]


@dataclass(frozen=True)
class Row:
    """What an evaluation found.

    Attributes:
        run: id of the run.
        size, form, learning_rate, budget, seed: what it was called, its peak learning rate and its tokens in all.
        step, tokens: done so far.
        seconds: of training so far: without compiling, evaluations and checkpoints.
        loss, loss_max: training loss since the row before, mean and largest, nats per token.
        held_out_loss: on held-out text.
        grad_norm, grad_norm_max: norm of the gradient before clipping since the row before, mean and largest.
        state: "" in the middle of the run, then "finished" or "diverged" (a loss or norm was not finite, or the model
            had become :attr:`dead`).
        parameters: of the model.
        flops_per_token: of training, those of recomputing not counted.
        corpus: id of the corpus.
        device, torch, commit, date: what it was measured with, and when.
    """

    run: str
    size: str
    form: str
    learning_rate: float
    budget: int
    seed: int
    step: int
    tokens: int
    seconds: float
    loss: float
    loss_max: float
    held_out_loss: float
    grad_norm: float
    grad_norm_max: float
    state: str
    parameters: int
    flops_per_token: float
    corpus: str
    device: str
    torch: str
    commit: str
    date: str

    @property
    def dead(self) -> bool:
        """Whether no gradient was left since the row before, though the loss is not 0: hidden states beyond 1e19, whose
        squares overflow, make a norm return 0, and then all logits are 0 for good."""
        return self.grad_norm_max == 0 and self.loss > 0

    @property
    def diverged(self) -> bool:
        """Whether what comes after tells nothing. Earlier rows call dead models finished."""
        return self.state == "diverged" or self.dead


_TYPES = typing.get_type_hints(Row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file up to the first incomplete line; none if there is no file.

    Raises:
        InputError: if it is no file of rows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if lines and lines[0] != list(_TYPES):
        raise InputError(f"{path} has other columns than {', '.join(_TYPES)}")
    try:
        return [Row(*(kind(value) for kind, value in zip(_TYPES.values(), line, strict=True))) for line in lines[1:]]
    except ValueError as error:
        raise InputError(f"{path} has a broken row: {error}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file by these rows."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_TYPES)
        writer.writerows(dataclasses.astuple(row) for row in rows)
    scratch.replace(path)


def append_row(path: Path, row: Row) -> None:
    """Appends a row, in one write: several processes may share the file."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(dataclasses.astuple(row))
