"""Pictures of the results of sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from stats import interval

from muddformer.plots import plot_connection_weights, plot_history_norms, plot_similarities, plot_sinks

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from report import Results

__all__ = ["INSPECTION_PICTURES", "draw_inspection", "draw_stability", "draw_time"]

INSPECTION_PICTURES = {
    "quality_weights.png": "Connection weights",
    "quality_similarities.png": "Likeness of the hidden states of any two blocks",
    "quality_sinks.png": "Attention to the first token",
    "quality_norms.png": "Norms of the history over training",
}

_COLOURS = ("#5f6368", "#2e7d32", "#6a3d9a", "#1f78b4", "#e08214", "#b2182b")


def draw_time(results: Sequence[Results], path: Path) -> None:
    """Final held-out loss over seconds of training: a point a budget, a line a form, a panel a set."""
    figure, axes = _panels(len(results))
    for axis, result in zip(axes, results, strict=True):
        for colour, (form, label) in zip(_COLOURS, result.set.labels.items(), strict=False):
            points = []
            for budget in result.budgets(form):
                rows = [row for _, row in result.runs(form=form, tokens=budget)]
                if seconds := result.seconds(form=form, tokens=budget):
                    points.append((interval(seconds)[0], *interval([row.held_out_loss for row in rows])))
            if points:
                seconds, losses, halves = zip(*sorted(points), strict=True)
                bars = [half or 0.0 for half in halves]
                axis.errorbar(seconds, losses, bars, color=colour, marker="o", markersize=4, capsize=3, label=label)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(result.set.title, fontsize=9)
        axis.set_xlabel(f"seconds of training, {result.device}", fontsize=8)
        axis.set_ylabel("held-out loss at the end (nats per token)", fontsize=8)
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_stability(results: Sequence[Results], path: Path) -> None:
    """Largest gradient norm between evaluations over tokens: a line a run, a panel a set."""
    figure, axes = _panels(len(results))
    styles = ("-", "--", ":", "-.")
    for axis, result in zip(axes, results, strict=True):
        rates = sorted({run.learning_rate for run in result.set.runs})
        for colour, (form, label) in zip(_COLOURS, result.set.labels.items(), strict=False):
            for run in (run for run in result.set.runs if run.form == form and run.id in result.rows):
                rows = result.rows[run.id]
                style = styles[rates.index(run.learning_rate) % len(styles)]
                name = f"{label}, {run.learning_rate:g}" if run.seed == result.set.runs[0].seed else None
                alive = [(row.tokens / 1e6, row.grad_norm_max) for row in rows if not row.dead]
                tokens, norms = zip(*alive, strict=True) if alive else ((), ())
                axis.plot(tokens, norms, style, color=colour, linewidth=1.2, label=name)
                if rows[-1].diverged:
                    axis.plot(tokens[-1:], norms[-1:], "x", color=colour)
        axis.set_yscale("log")
        axis.set_title(result.set.title, fontsize=9)
        axis.set_xlabel("tokens (millions)", fontsize=8)
        axis.set_ylabel("largest gradient norm", fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_inspection(models: dict[str, dict[str, Any]], folder: Path) -> None:
    """The pictures of what connections do, of models by their labels; weights and norms are of the last with some."""
    weights, similarities, sinks, norms = (folder / name for name in INSPECTION_PICTURES)
    label, chosen = [(label, model) for label, model in models.items() if model["plan"]][-1]
    plan, ways = ({int(i): value for i, value in chosen[name].items()} for name in ("plan", "ways"))
    means, stds = ({int(i): value for i, value in chosen[name].items()} for name in ("weight_means", "weight_stds"))
    plot_connection_weights(means, stds, plan, ways, weights, label)
    plot_similarities({label: model["similarities"]["x"] for label, model in models.items()}, similarities)
    plot_sinks({label: model["sinks"] for label, model in models.items()}, sinks)
    by_tokens = {f"{int(tokens) / 1e6:.0f}M tokens": values for tokens, values in chosen["norms"].items()}
    plot_history_norms(by_tokens, norms, label)


def _panels(count: int) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count + 0.6, 3.6), squeeze=False, constrained_layout=True)
    return figure, axes[0]
