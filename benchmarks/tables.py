"""What report.py and plot.py share: rows of the CSV files, runs of a training step, cells and tables of Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NONE = "-"

Row = dict[str, str]
Line = tuple[list[str], list[Row]]  # the cells of a line, and the rows that they come from


# ---- reading ----------------------------------------------------------------------------------------------------
def read(name: str) -> list[Row]:
    """The rows of a CSV file, in order; none where there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{**row, "csv": name} for row in csv.DictReader(file)]


def read_gpus(subject: str) -> list[Row]:
    """The rows of every GPU's file of a subject (h100_SUBJECT.csv, ...), by date; of one day the older GPU's first."""
    rows: list[Row] = []
    for path in sorted(RESULTS.glob("*.csv")):
        device, _, its_subject = path.stem.partition("_")
        if device != "cpu" and its_subject == subject:
            rows += read(path.stem)
    return sorted(rows, key=lambda row: row["date"])


def latest(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], Row]:
    """By the values of the columns, the last row that has them; in the order in which they first appear."""
    return {tuple(row[column] for column in columns): row for row in rows}


def step_runs(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The runs of train_step.py, each the rows of its methods by name."""
    runs: list[dict[str, Row]] = []
    key = None
    for row in rows:
        its = tuple(row[k] for k in ("model", "batch", "length", "device", "torch", "commit", "date"))
        if its != key or row["method"] in runs[-1]:
            runs.append({})
            key = its
        runs[-1][row["method"]] = row
    return runs


def profiles() -> dict[tuple[str, str, str, str], list[Row]]:
    """By layers x width, batch, way to run ("Python", ..) and methods the rows of a pair's last profile.

    Of the pairs whose plain model has a bfloat16 residual stream, as every model has under FSDP2.
    """
    pairs: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in read_gpus("profile_step"):
        run = row.get("run", "Python")
        if not row["methods"].startswith("plain16") and not run.startswith("FSDP2"):
            continue
        rows = pairs.setdefault((row["model"], row["batch"], run, row["methods"]), [])
        if rows and any(rows[-1][k] != row[k] for k in ("device", "torch", "commit", "date")):
            rows.clear()  # measured again
        rows.append(row)
    return pairs


def twins(run: dict[str, Row], how: str) -> list[Row]:
    """The two plain models of a run, or those of them that it has."""
    return [run[m] for m in (f"plain-{how}", f"plain16-{how}") if m in run and run[m]["status"] == "ok"]


def fair_twin(run: dict[str, Row], how: str) -> Row | None:
    """The faster of the two plain models, if the run has both."""
    found = twins(run, how)
    return min(found, key=lambda row: float(row["ms"])) if len(found) == 2 else None


def step_run(runs: Sequence[dict[str, Row]], model: tuple[str, str], method: str) -> dict[str, Row] | None:
    """The last run of a method at a size (layers x width, batch) that has both twins, else the last."""
    has = [run for run in runs if method in run and (run[method]["model"], run[method]["batch"]) == model]
    whole = [run for run in has if fair_twin(run, method.rpartition("-")[2])]
    return (whole or has or [None])[-1]


# ---- cells ------------------------------------------------------------------------------------------------------
def number(text: str | float | None) -> str:
    """Three digits after the point below 1, two below 10, one below 1000, none beyond."""
    if text in (None, ""):
        return NONE
    value = float(text)
    return f"{value:,.{3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def ratio(part: str | float | None, whole: str | float | None, digits: int = 3) -> str:
    return f"{float(part) / float(whole):.{digits}f}" if part and whole else NONE


def several(rows: Sequence[Row | None], column: str) -> str:
    return ", ".join(number(row and row[column]) for row in rows)


def fraction(row: Row | None, column: str = "fraction_of_floor") -> str:
    return f"{float(row[column]):.2f}" if row and row.get(column) else NONE


def together(a: Row | None, b: Row | None) -> bool:
    """Whether two rows may be divided by each other: measured on one device with one torch and commit."""
    return bool(a and b) and all(a[k] == b[k] for k in ("device", "torch", "commit"))


def table(head: Sequence[str], lines: Sequence[Line], words: int = 1) -> str:
    """A Markdown table with the commit of every line, and below it what all lines have in common.

    Args:
        head: titles of the columns.
        lines: cells, and the rows that they come from; no line: nothing was measured.
        words: how many of the first columns are text.
    """
    if not lines:
        return "(not measured)\n"

    def origin(rows: list[Row], column: str) -> str:
        return ", ".join(dict.fromkeys(r[column] for r in rows if r.get(column)))

    everything = [row for _, rows in lines for row in rows]
    shared = [c for c in ("device", "torch", "cuda") if len({row.get(c, "") for row in everything}) == 1]
    apart = [c for c in ("device", "torch") if c not in shared]
    text = [f"| {' | '.join([*head, *apart, 'commit'])} |"]
    text.append(f"|{'---|' * words}{'--:|' * (len(head) - words)}{'---|' * (len(apart) + 1)}")
    for cells, rows in lines:
        text.append(f"| {' | '.join([*cells, *(origin(rows, c) for c in apart), origin(rows, 'commit')])} |")
    names = {"device": "", "torch": "torch ", "cuda": "CUDA "}
    common = [names[c] + everything[0][c] for c in shared if everything[0].get(c)]
    files = [f"[{name}.csv](RESULTS/{name}.csv)" for name in dict.fromkeys(row["csv"] for row in everything)]
    return "\n".join([*text, "", f"{', '.join(files)}{': ' if common else ''}{'; '.join(common)}.", ""])
