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
from stats import WIDEST, cost_at_loss, format_interval, interval

from muddformer.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
_SETS = sorted(Path(__file__).parent.glob("runs/*.yaml"), key=lambda path: path.stem)
HEADINGS = {
    "time": "Time to loss",
    "sweep": "Learning rates",
    "ablation": "What each part brings",
    "stability": "Stability at depth",
}
_TOLD = {
    "time": f"""\
Advantage: the cost at which the plain model reaches the same loss, over the cost here. For the former the loss is taken
as a power of the cost between two of the plain model's budgets; a curve that flattens lies below that, so true
advantages are rather smaller, and budgets more than {WIDEST:g} times apart are not joined. Where not every seed has
both budgets, an advantage is that of the means in the table. A dash: the plain model was not trained to that loss from
both sides.""",
    "sweep": """\
Held-out loss at the end by peak learning rate, in bold the lowest mean over the seeds that all rates have; below it the
largest norm of a gradient before it is clipped, of any step after the warm-up and any seed.""",
    "ablation": "The largest gradient norm is that of any step after the warm-up and any seed, before it is clipped.",
    "stability": """\
The largest norm and loss are those of any step after the warm-up. A run that diverged has a loss or gradient that is
not finite, or no gradient any more, as where hidden states beyond 1e19, whose squares overflow, make the last norm
return 0, and so all logits.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("rows", type=Path, help="CSV file that run.py wrote")
    p.add_argument("--sets", type=Path, nargs="+", default=_SETS)
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
                found = self.rows.setdefault(row.run, [])
                if found and found[-1].step == row.step:
                    raise InputError(f"run {row.run} was made twice: step {row.step} of it has two rows")
                found.append(row)
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
            and not self.final[run.id].diverged
            and all(getattr(run, name) == value for name, value in fields.items())
        ]

    def by_seed(self, value: Callable[[Row], float], **fields: object) -> dict[int, float]:
        """A value of the last row of each such run, by seed."""
        return {run.seed: value(row) for run, row in self.runs(**fields)}

    def budgets(self, form: str) -> list[int]:
        """Budgets of the form's finished runs."""
        return sorted({run.tokens for run, _ in self.runs(form=form)})

    def seconds(self, **fields: object) -> list[float]:
        """Seconds of the last rows of runs on :attr:`device`, which alone can be compared."""
        return [row.seconds for _, row in self.runs(**fields) if row.device == self.device]

    @property
    def device(self) -> str:
        """The device that most of the set's runs ended on."""
        return Counter(row.device for row in self.final.values()).most_common(1)[0][0]


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
        lines += [f"## {HEADINGS[kind]}", "", _TOLD[kind], ""]
        if kind in _PICTURES:
            lines += [f"![{HEADINGS[kind]}]({_PICTURES[kind][0]})", ""]
        for result in chosen:
            lines += [f"### {result.set.title}", "", _settings(result), "", *_SECTIONS[kind](result), ""]
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
    shares = sorted(row.tokens / row.parameters for row in rows)
    return [
        f"Written by benchmarks/quality/report.py from the rows of {len(rows)} runs. The text is program source and",
        "its documentation: Linux, compilers, libraries, from the Debian packages that benchmarks/quality/corpus.yaml",
        "lists. A run sees each token once, while the learning rate falls along a cosine until the run ends; with",
        "bfloat16 autocast, torch.compile and fused AdamW. The runs are short:",
        f"{shares[0]:.1f} to {shares[-1]:.1f} tokens a parameter.",
        "",
        "Losses are those of held-out files at the end of a run, in nats per token. ± is the 95 % interval of a mean",
        "over seeds (Student's t); a number without ± is of a single run. Differences are taken seed by seed. Seconds",
        "are those of training on one card, without compiling. The residual stream of the plain model is bfloat16, as",
        "MUDD's is: the faster of its two twins; one in float32 was not trained. MUDD has FFN re-allocation, plain has",
        "not. PrePostDANorm is that of the public release, which norms the aggregate of the residual way alone",
        '(`post_norm="residual"`), unless all ways are said to have norms.',
        "",
        f"Device {told['device']}; torch {told['torch']}; commit {told['commit']}; corpus {told['corpus']}.",
    ]


def _settings(result: Results) -> str:
    """What all runs of a set have in common."""
    run = result.set.runs[0]
    settings, length = run.settings, run.model["block_size"]
    held_out = settings.eval_batches * settings.batch_size * length
    return (
        f"Steps of {settings.batch_size} sequences of {length} tokens; losses over up to {held_out / 1e6:.2f}M held-out"
        f" tokens; {len(result.final)} of {len({run.id for run in result.set.runs})} runs have ended."
    )


def _time(result: Results) -> list[str]:
    base, rows = result.set.baseline, []
    for form, label in result.set.labels.items():
        for budget in result.budgets(form):
            losses, compute = (result.by_seed(of, form=form, tokens=budget) for of in (_loss, _flops))
            cells = [label, _millions(budget), format_interval(list(losses.values()), 3), str(len(losses))]
            cells += ["0" if form == base else format_interval(_beside(result, form, base, budget), 3)]
            cells += [f"{statistics.fmean(compute.values()) / 1e15:,.0f}"]
            cells += [format_interval(result.seconds(form=form, tokens=budget), 0)]
            advantages = [format_interval(advantage(result, form, budget, cost), 2) for cost in (_flops, _seconds)]
            rows.append([*cells, *(["1", "1"] if form == base else advantages)])
    heads = ["", "tokens", "held-out loss", "seeds", f"minus {result.set.labels[base]}", "PFLOP", "seconds"]
    return [*_table([*heads, "compute advantage", "wall-clock advantage"], rows), *_goals(result)]


def _beside(result: Results, form: str, other: str, budget: int) -> list[float]:
    """Losses of a form minus those of another, seed by seed."""
    losses, of_other = (result.by_seed(_loss, form=name, tokens=budget) for name in (form, other))
    return [loss - of_other[seed] for seed, loss in losses.items() if seed in of_other]


def advantage(result: Results, form: str, budget: int, cost: Callable[[Row], float]) -> list[float]:
    """The cost of the baseline at the loss of a form's budget, over the form's.

    Returns:
        A value for each seed where all seeds can tell it, else that of the means, or none.
    """

    def runs(form: str, **fields: object) -> list[tuple[Run, Row]]:
        found = result.runs(form=form, **fields)
        # Seconds compare on one kind of device only.
        return [(run, row) for run, row in found if cost is not _seconds or row.device == result.device]

    own, base = runs(form, tokens=budget), runs(result.set.baseline)
    values = []
    for run, row in own:
        points = [(cost(other), other.held_out_loss) for r, other in base if r.seed == run.seed]
        needed = cost_at_loss(points, row.held_out_loss)
        values += [] if needed is None else [needed / cost(row)]
    if not own or len(values) == len(own):
        return values
    points = []
    for tokens in {run.tokens for run, _ in base}:
        rows = [row for run, row in base if run.tokens == tokens]
        points.append((statistics.fmean(map(cost, rows)), statistics.fmean(map(_loss, rows))))
    needed = cost_at_loss(points, statistics.fmean(_loss(row) for _, row in own))
    return [] if needed is None else [needed / statistics.fmean(cost(row) for _, row in own)]


def _goals(result: Results) -> list[str]:
    """What was to be reached and what was, by the best form at the largest budget that tells it."""
    base, goals, lines = result.set.baseline, dict(result.set.goals), []
    least = goals.pop("tokens", 0)
    for name, asked in goals.items():
        found: dict[int, dict[str, list[float]]] = {}  # by budget and form
        for form in result.set.labels.keys() - {base}:
            for budget in result.budgets(form):
                if name == "loss":
                    values = [-difference for difference in _beside(result, form, base, budget)]
                else:
                    values = advantage(result, form, budget, _flops if name == "compute" else _seconds)
                if values:
                    found.setdefault(budget, {})[form] = values
        what = {"loss": f"nats below {result.set.labels[base]}", "compute": "times the compute"}.get(name)
        asked_for = f"* Goal: {asked:g} {what or 'times the seconds'}"
        if name == "loss" and least:
            asked_for += f" after {_millions(least)} tokens or more"
        if not found:
            lines.append(f"{asked_for}. Not measured.")
            continue
        budget = max(found)
        told = {form: format_interval(values, 3) for form, values in found[budget].items()}
        measured = "; ".join(f"{label} {told[form]}" for form, label in result.set.labels.items() if form in told)
        best = max(interval(values)[0] for values in found[budget].values())
        verdict = "reached" if best >= asked else "NOT reached"
        if name == "loss" and budget < least:
            verdict = "not measured at so many"
        lines.append(f"{asked_for}. At {_millions(budget)}: {measured}: {verdict}.")
    return ["", *lines] if lines else []


def _saved(results: Sequence[Results]) -> str:
    """Of the largest models the largest budget that can tell it, by the form that saves the most compute there."""
    found = []
    for result in (result for result in results if result.set.kind == "time"):
        parameters = max(row.parameters for row in result.final.values())
        for form, label in result.set.labels.items():
            for budget in result.budgets(form):
                compute, seconds = (advantage(result, form, budget, cost) for cost in (_flops, _seconds))
                if form != result.set.baseline and compute and seconds:
                    means = statistics.fmean(compute), statistics.fmean(seconds)
                    single = all(len(result.runs(form=f, tokens=budget)) == 1 for f in (form, result.set.baseline))
                    told = result.device + ", one run of each" * single
                    found.append((parameters, budget, means, label, result.set.title, told))
    if not found:
        return ""
    _, budget, (compute_mean, seconds_mean), label, title, told = max(found)
    return (
        f"{_millions(budget)} tokens of program source bring {label} ({title}) to the held-out loss for which plain\n"
        f"takes about {compute_mean:.1f} times the compute and {seconds_mean:.1f} times the seconds "
        f"({told}; [how sure that is](docs/quality.md#time-to-loss)).\n"
    )


def _sweep(result: Results) -> list[str]:
    rates = sorted({run.learning_rate for run in result.set.runs})
    rows, norms = [], []
    for form, label in result.set.labels.items():
        if not result.runs(form=form):
            continue
        losses = [result.by_seed(_loss, form=form, learning_rate=rate) for rate in rates]
        shared = set.intersection(*(set(values) for values in losses if values))
        means = [statistics.fmean(values[seed] for seed in shared) if values and shared else None for values in losses]
        best = min((mean for mean in means if mean is not None), default=None)
        cells = [format_interval(list(values.values()), 3) for values in losses]
        bold = [mean is not None and mean == best for mean in means]
        rows.append([label, *(f"**{cell}**" if b else cell for cell, b in zip(cells, bold, strict=True))])
        ended = [[_largest_norm(result, run) for run, _ in result.runs(form=form, learning_rate=r)] for r in rates]
        norms.append([label, *(f"{max(values):.1f}" if values else "-" for values in ended)])
    heads = [f"after {_millions(result.set.runs[0].tokens)} tokens", *(f"{rate:g}" for rate in rates)]
    return [*_table(heads, rows), "", *_table(["largest gradient norm", *heads[1:]], norms)]


def _ablation(result: Results) -> list[str]:
    base, beside, lines = result.set.baseline, result.set.beside, []
    heads = ["", "parameters", "GFLOP a token", "seconds", "largest gradient norm", "held-out loss", "seeds"]
    heads += [f"minus {result.set.labels[other]}" for other in (base, *beside)]
    for budget in sorted({run.tokens for run, _ in result.runs()}):
        rows = []
        for form, label in result.set.labels.items():
            losses = result.by_seed(_loss, form=form, tokens=budget)
            if not losses:
                continue
            runs = result.runs(form=form, tokens=budget)
            row = runs[0][1]
            cells = [label, f"{row.parameters / 1e6:.1f}M", f"{row.flops_per_token / 1e9:.3f}"]
            cells += [format_interval(result.seconds(form=form, tokens=budget), 0)]
            cells += [f"{max(_largest_norm(result, run) for run, _ in runs):.1f}"]
            cells += [format_interval(list(losses.values()), 3), str(len(losses))]
            differences = [_beside(result, form, other, budget) for other in (base, *beside)]
            cells += [
                "0" if form == other else format_interval(values, 3)
                for other, values in zip((base, *beside), differences, strict=True)
            ]
            rows.append(cells)
        lines += [f"After {_millions(budget)} tokens.", "", *_table(heads, rows), "", *_steps(result, budget)]
    return lines[:-1]


def _steps(result: Results, budget: int) -> list[str]:
    """What each form of the set's order brings beyond the one before."""
    found = []
    for before, form in itertools.pairwise(result.set.order):
        if differences := _beside(result, form, before, budget):
            labels = result.set.labels
            found.append(f"{labels[before]} to {labels[form]} {format_interval(differences, 3)}")
    return [f"Step by step, in nats: {'; '.join(found)}.", ""] if found else []


def _settled(result: Results, run: Run) -> list[Row]:
    """The rows of a run that tell of no step of its warm-up."""
    found, warmup = result.rows[run.id], run.settings.warmup_steps
    return [row for before, row in itertools.pairwise(found) if before.step >= warmup] or found


def _largest_norm(result: Results, run: Run) -> float:
    return max(row.grad_norm_max for row in _settled(result, run))


def _stability(result: Results) -> list[str]:
    rows = []
    for run in result.set.runs:
        if run.id not in result.final:
            continue
        settled, last = _settled(result, run), result.final[run.id]
        lost = next((row for row in result.rows[run.id] if row.diverged), None)
        end = f"diverged by {_millions(lost.tokens)} tokens" if lost else f"{last.held_out_loss:.3f}"
        norm, loss = (max(getattr(row, name) for row in settled) for name in ("grad_norm_max", "loss_max"))
        cells = [result.set.labels[run.form], f"{run.learning_rate:g}", str(run.seed), end]
        rows.append([*cells, f"{norm:,.1f}", f"{loss:.2f}"])
    heads = ["", "peak learning rate", "seed", "held-out loss", "largest gradient norm", "largest loss"]
    return _table(heads, rows)


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
    sizes = {model["size"] for model in models}
    labels = {
        run.id: result.set.labels[run.form] + (f", {result.set.title}" if len(sizes) > 1 else "")
        for result in results
        for run in result.set.runs
    }
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


def _flops(row: Row) -> float:
    return row.flops_per_token * row.tokens


def _seconds(row: Row) -> float:
    return row.seconds


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
