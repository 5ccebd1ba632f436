"""Writes docs/quality.md, its pictures and its part of README.md: ``python benchmarks/quality/report.py ROWS``."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pictures import INSPECTION_PICTURES, draw_inspection, draw_stability, draw_time
from rows import Row, read_rows
from sets import KINDS, Run, RunSet, load_set
from stats import cost_at_loss, format_interval, interval

from muddformer.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
HEADINGS = {
    "time": "Time to loss",
    "sweep": "Learning rates",
    "ablation": "What each part brings",
    "stability": "Stability at depth",
}


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("rows", type=Path, help="CSV file that run.py wrote")
    p.add_argument("--sets", type=Path, nargs="+", default=sorted(Path(__file__).parent.glob("runs/*.yaml")))
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--inspection", type=Path, default=ROOT / "benchmarks" / "results" / "quality_inspection.json")
    p.add_argument("--repeats", type=Path, default=ROOT / "benchmarks" / "results" / "quality_repeats.csv")
    p.add_argument("--check", action="store_true", help="write nothing, fail if a page is not what the rows give")
    args = p.parse_args(arguments)
    try:
        results = [result for path in args.sets if (result := Results(load_set(path), read_rows(args.rows))).compares()]
        models = json.loads(args.inspection.read_text(encoding="utf-8")) if args.inspection.exists() else []
        texts = {args.page: page(results, models, read_rows(args.repeats)), args.readme: readme(args.readme, results)}
        if args.check:
            return int(any(not p.exists() or p.read_text(encoding="utf-8") != text for p, text in texts.items()))
        args.page.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        draw(results, args.page.parent)
        if models:
            draw_inspection(_labelled(models, results), args.page.parent)
    except InputError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


class Results:
    """What there is of a set.

    Attributes:
        set: the set.
        rows: by id of its runs, their rows in order.
        final: by id of its ended runs, their last row.
    """

    def __init__(self, run_set: RunSet, rows: Sequence[Row]) -> None:
        self.set = run_set
        self.rows: dict[str, list[Row]] = {}
        ids = {run.id for run in run_set.runs}
        for row in sorted(rows, key=lambda row: row.step):
            if row.run in ids:
                self.rows.setdefault(row.run, []).append(row)
        self.final = {i: found[-1] for i, found in self.rows.items() if found[-1].state}

    def compares(self) -> bool:
        """Whether there is more than the baseline."""
        return any(run.id in self.final and run.form != self.set.baseline for run in self.set.runs)

    def runs(self, **fields: object) -> list[tuple[Run, Row]]:
        """Finished runs whose fields have these values, with their last rows."""
        return [
            (run, self.final[run.id])
            for run in self.set.runs
            if run.id in self.final
            and self.final[run.id].state == "finished"
            and all(getattr(run, name) == value for name, value in fields.items())
        ]

    def by_seed(self, value: Callable[[Row], float], **fields: object) -> dict[int, float]:
        """A value of the last row of each such run, by seed."""
        return {run.seed: value(row) for run, row in self.runs(**fields)}

    def budgets(self, form: str) -> list[int]:
        """Budgets of the form's finished runs."""
        return sorted({run.tokens for run, _ in self.runs(form=form)})


def page(results: Sequence[Results], models: Sequence[dict[str, Any]] = (), repeats: Sequence[Row] = ()) -> str:
    """The text of docs/quality.md.

    Args:
        results: of the sets that compare something.
        models: what inspection.py found.
        repeats: rows of runs that were done again.
    """
    lines = ["# Quality: the same loss for less", "", *_opening(results), ""]
    for kind in KINDS:
        chosen = [result for result in results if result.set.kind == kind]
        if not chosen:
            continue
        lines += [f"## {HEADINGS[kind]}", ""]
        if kind in _PICTURES:
            lines += [f"![{HEADINGS[kind]}]({_PICTURES[kind][0]})", ""]
        for result in chosen:
            lines += [f"### {result.set.title}", "", *_SECTIONS[kind](result), ""]
            if result.set.note:
                lines += [" ".join(result.set.note.split()), ""]
    if repeated := _repeats(results, repeats):
        lines += ["## Noise of the hardware", "", *repeated, ""]
    if models:
        lines += ["## What the connections learn", "", *_inspection(_labelled(models, results)), ""]
    return "\n".join(lines)


def readme(path: Path, results: Sequence[Results]) -> str:
    """The text of README.md with its part on quality made anew: the compute and the time that the largest models save.

    Raises:
        InputError: if it has no place for that.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    begin, end = "<!-- quality -->", "<!-- end quality -->"
    if begin not in text or end not in text:
        raise InputError(f"{path} has no {begin} and {end}, between which the quality of the models is told")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{_saved(results)}{end}{after}"


def draw(results: Sequence[Results], folder: Path) -> None:
    """The pictures of the page, beside it."""
    for kind, (name, picture) in _PICTURES.items():
        chosen = [result for result in results if result.set.kind == kind]
        if kind == "time":  # a curve has two points at least
            chosen = [result for result in chosen if len(result.budgets(result.set.baseline)) > 1]
        if chosen:
            picture(chosen, folder / name)


def _opening(results: Sequence[Results]) -> list[str]:
    rows = {i: row for result in results for i, row in result.final.items()}.values()
    if not rows:
        raise InputError("no run of these sets has ended in the rows")
    told = {name: _join(getattr(row, name) for row in rows) for name in ("device", "torch", "commit", "corpus")}
    return [
        f"Written by benchmarks/quality/report.py from the rows of {len(rows)} runs on real text: Linux, compilers,",
        "libraries and documentation, from the Debian packages that benchmarks/quality/corpus.yaml lists, split by",
        "file. Every run sees each token once, under a cosine to its end, with bfloat16 autocast, torch.compile and",
        "fused AdamW. Losses are those of held-out files at the end of a run, in nats per token; ± is the 95 %",
        "interval of a mean over seeds. Differences and ratios are taken seed by seed. Seconds are those of",
        "training on one card, without compiling. The plain model keeps its residual stream in bfloat16, as MUDD",
        "does: the faster of the two twins.",
        "",
        f"Device {told['device']}; torch {told['torch']}; commit {told['commit']}; corpus {told['corpus']}.",
    ]


def _time(result: Results) -> list[str]:
    fastest, lines = _device(result), []
    rows = []
    for form, label in result.set.labels.items():
        for budget in result.budgets(form):
            loss = result.by_seed(lambda row: row.held_out_loss, form=form, tokens=budget)
            compute = result.by_seed(_flops, form=form, tokens=budget)
            seconds = [row.seconds for _, row in result.runs(form=form, tokens=budget) if row.device == fastest]
            more = [_of(values, len(loss)) for values in advantages(result, form, budget, fastest)]
            cells = [label, _millions(budget), format_interval(list(loss.values()), 3), str(len(loss))]
            cells += [f"{interval(list(compute.values()))[0] / 1e15:,.0f}", format_interval(seconds, 0)]
            rows.append([*cells, *(["1", "1"] if form == result.set.baseline else more)])
    heads = ["", "tokens", "held-out loss", "seeds", "PFLOP", "seconds", "compute advantage", "wall-clock advantage"]
    lines += _table(heads, rows)
    base = result.set.labels[result.set.baseline]
    lines += [
        "",
        f"Advantage: what {base} needs for the same loss, read off between its budgets, over what is needed here;",
    ]
    return [*lines, f"a dash where {base} was not trained to that loss from both sides.", *_goals(result, fastest)]


def _of(values: Sequence[float], seeds: int) -> str:
    """An advantage, and of how many seeds where it is not all of them."""
    text = format_interval(values, 2)
    return f"{text} (of {len(values)})" if 0 < len(values) < seeds else text


def _goals(result: Results, device: str) -> list[str]:
    """What was to be reached and what was: at the largest budget that shows it, by the form that is best there."""
    lines, base, goals = [], result.set.baseline, dict(result.set.goals)
    least = goals.pop("tokens", 0)
    for name, asked in goals.items():
        found = []
        for form in result.set.labels.keys() - {base}:
            for budget in result.budgets(form):
                if name == "loss":
                    plain, losses = (result.by_seed(_loss, form=f, tokens=budget) for f in (base, form))
                    values = [plain[seed] - loss for seed, loss in losses.items() if seed in plain]
                else:
                    values = advantages(result, form, budget, device)[name == "seconds"]
                if values:
                    found.append((budget, interval(values)[0], form, values))
        what = {"loss": f"nats below {result.set.labels[base]}", "compute": "times the compute"}.get(name)
        what = what or "times the seconds"
        if found:
            budget, mean, form, values = max(found)
            verdict = "reached" if mean >= asked else "NOT reached"
            if name == "loss" and budget < least:
                verdict += f", asked for at {_millions(least)} tokens or more"
            measured = (
                f"{result.set.labels[form]} at {_millions(budget)} tokens: {format_interval(values, 3)}: {verdict}"
            )
            lines.append(f"* Asked for: {asked:g} {what}. {measured}.")
        else:
            lines.append(f"* Asked for: {asked:g} {what}. Not measured.")
    return ["", *lines] if lines else []


def advantages(result: Results, form: str, budget: int, device: str) -> tuple[list[float], list[float]]:
    """Compute and wall-clock advantage over the baseline at the loss of a budget, one value a seed."""
    found: tuple[list[float], list[float]] = ([], [])
    for values, cost in zip(found, (_flops, lambda row: row.seconds), strict=True):
        for run, row in result.runs(form=form, tokens=budget):
            of_plain = [r for _, r in result.runs(form=result.set.baseline, seed=run.seed)]
            if cost is not _flops:  # seconds compare on one kind of device only
                of_plain = [r for r in of_plain if r.device == row.device == device]
            needed = cost_at_loss([(cost(r), r.held_out_loss) for r in of_plain], row.held_out_loss)
            if needed is not None:
                values.append(needed / cost(row))
    return found


def _saved(results: Sequence[Results]) -> str:
    """Of the largest models the largest budget that can tell it, by the form that saves the most compute there."""
    found = []
    for result in (result for result in results if result.set.kind == "time"):
        device, parameters = _device(result), max(row.parameters for row in result.final.values())
        for form, label in result.set.labels.items():
            for budget in result.budgets(form):
                compute, seconds = advantages(result, form, budget, device)
                if form != result.set.baseline and compute and seconds:
                    means = interval(compute)[0], interval(seconds)[0]
                    found.append((parameters, budget, means, len(compute), label, result.set.title, device))
    if not found:
        return ""
    _, budget, (compute_mean, seconds_mean), seeds, label, title, device = max(found)
    return (
        f"On real text ({title}), {_millions(budget)} tokens bring {label} to the held-out loss for which the plain\n"
        f"model takes {compute_mean:.2f} times the compute and {seconds_mean:.2f} times the seconds "
        f"({seeds} seed{'s' * (seeds > 1)}, {device}; [all runs](docs/quality.md)).\n"
    )


def _sweep(result: Results) -> list[str]:
    rates = sorted({run.learning_rate for run in result.set.runs})
    rows = []
    for form, label in result.set.labels.items():
        losses = [list(result.by_seed(_loss, form=form, learning_rate=rate).values()) for rate in rates]
        best = min((interval(values)[0] for values in losses if values), default=None)
        cells = [format_interval(values, 3) for values in losses]
        bold = [bool(values) and interval(values)[0] == best for values in losses]
        rows.append([label, *(f"**{cell}**" if b else cell for cell, b in zip(cells, bold, strict=True))])
    tokens = _join(_millions(run.tokens) for run in result.set.runs)
    heads = ["", *(f"{rate:g}" for rate in rates)]
    return [f"Held-out loss after {tokens} tokens by peak learning rate; the best in bold.", "", *_table(heads, rows)]


def _ablation(result: Results) -> list[str]:
    base, lines = result.set.baseline, []
    heads = ["", "parameters", "GFLOP a token", "held-out loss", "seeds", f"minus {result.set.labels[base]}"]
    for budget in sorted({run.tokens for run, _ in result.runs()}):
        of_base, rows = result.by_seed(_loss, form=base, tokens=budget), []
        for form, label in result.set.labels.items():
            losses = result.by_seed(_loss, form=form, tokens=budget)
            if not losses:
                continue
            differences = [loss - of_base[seed] for seed, loss in losses.items() if seed in of_base]
            row = result.runs(form=form, tokens=budget)[0][1]
            cells = [label, f"{row.parameters / 1e6:.1f}M", f"{row.flops_per_token / 1e9:.3f}"]
            cells += [format_interval(list(losses.values()), 3), str(len(losses))]
            rows.append([*cells, "0" if form == base else format_interval(differences, 3)])
        lines += [f"After {_millions(budget)} tokens.", "", *_table(heads, rows), "", *_steps(result, budget)]
    return lines[:-1]


def _steps(result: Results, budget: int) -> list[str]:
    """What each form of the set's order brings beyond the one before."""
    found = []
    for before, form in itertools.pairwise(result.set.order):
        old, new = (result.by_seed(_loss, form=name, tokens=budget) for name in (before, form))
        if differences := [loss - old[seed] for seed, loss in new.items() if seed in old]:
            label = result.set.labels[form]
            found.append(f"{label} {format_interval(differences, 3)} (of {len(differences)})")
    told = "Each form minus the one before it, in nats, seed by seed (of how many)"
    return [f"{told}: {'; '.join(found)}.", ""] if found else []


def _stability(result: Results) -> list[str]:
    rows = []
    for run in result.set.runs:
        if run.id not in result.final:
            continue
        found, last = result.rows[run.id], result.final[run.id]
        settled = [row for row in found if row.step > run.settings.warmup_steps] or found
        end = (
            f"{last.held_out_loss:.3f}" if last.state == "finished" else f"diverged by {_millions(last.tokens)} tokens"
        )
        norm, loss = (max(getattr(row, name) for row in settled) for name in ("grad_norm_max", "loss_max"))
        cells = [result.set.labels[run.form], f"{run.learning_rate:g}", str(run.seed), end]
        rows.append([*cells, f"{norm:.2f}", f"{loss:.2f}"])
    heads = ["", "peak learning rate", "seed", "held-out loss", "largest gradient norm", "largest loss"]
    return [*_table(heads, rows), "", "The largest of any step after the warm-up."]


def _repeats(results: Sequence[Results], repeats: Sequence[Row]) -> list[str]:
    """Losses of runs that were done again from scratch, beside those of the first time."""
    first = {i: row for result in results for i, row in result.final.items()}
    labels = {run.id: result.set.labels[run.form] for result in results for run in result.set.runs}
    rows = []
    for again in (row for row in repeats if row.state == "finished" and row.run in first):
        losses = (first[again.run].held_out_loss, again.held_out_loss)
        cells = [labels[again.run], again.size, _millions(again.budget), str(again.seed)]
        rows.append([*cells, *(f"{value:.4f}" for value in (*losses, abs(losses[1] - losses[0])))])
    if not rows:
        return []
    heads = ["", "layers x width", "tokens", "seed", "held-out loss", "again", "distance"]
    told = "Runs repeated from scratch with the same seed: sums on a GPU are not added in the same order each time."
    return [told, "", *_table(heads, rows)]


def _labelled(models: Sequence[dict[str, Any]], results: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """What inspection.py found by the labels of the forms, in the order of their sets."""
    labels = {run.id: result.set.labels[run.form] for result in results for run in result.set.runs}
    order = list(labels)
    if unknown := [model["run"] for model in models if model["run"] not in labels]:
        raise InputError(f"the inspection is of runs that are in no set: {', '.join(unknown)}")
    return {labels[m["run"]]: m for m in sorted(models, key=lambda m: order.index(m["run"]))}


def _inspection(models: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for label, model in models.items():
        sinks = [share for layer in model["sinks"] for share in layer]
        alike = [statistics.fmean(m[i][i - 1] for i in range(1, len(m))) for m in model["similarities"].values()]
        norms = model["history_rms"]
        cells = [label, *(f"{value:.3f}" for value in alike), f"{statistics.fmean(sinks):.1%}"]
        rows.append([*cells, f"{norms[0]:.3g}", f"{norms[-1]:.3g}"])
    first = next(iter(models.values()))
    streams = {"q": "queries", "k": "keys", "v": "values", "x": "hidden states"}
    heads = ["", *(streams[name] for name in first["similarities"]), "attention to the first token", "X_0", "X_L"]
    trained = _join(f"{model['size']}, {_millions(model['trained'])} tokens" for model in models.values())
    return [
        f"Models of {trained}; means over {first['tokens']:,} held-out tokens, as `muddformer inspect` measures them:",
        "cosine similarity of what a block is given, or makes, to that of the block before; share of the attention",
        "that later tokens pay to the first; root mean square of the first and the last hidden state.",
        "",
        *_table(heads, rows),
        "",
        *(f"![{title}]({name})\n" for name, title in INSPECTION_PICTURES.items()),
    ]


def _device(result: Results) -> str:
    """The device that most of the set's runs ended on: seconds of others are left out."""
    return Counter(row.device for row in result.final.values()).most_common(1)[0][0]


def _flops(row: Row) -> float:
    return row.flops_per_token * row.tokens


def _loss(row: Row) -> float:
    return row.held_out_loss


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.0f}M"


def _join(values: object) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


_SECTIONS = {"time": _time, "sweep": _sweep, "ablation": _ablation, "stability": _stability}
_PICTURES = {"time": ("quality_time.png", draw_time), "stability": ("quality_stability.png", draw_stability)}


if __name__ == "__main__":
    sys.exit(main())
