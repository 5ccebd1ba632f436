"""Pictures of finished runs, made from their ``metrics.csv`` alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import require

__all__ = ["plot_losses"]

_COLOURS = ("#8a8a8a", "#c0392b", "#2471a3", "#1e8449")


def plot_losses(runs: Mapping[str, Sequence[Sequence[Any]]], path: Path, title: str) -> None:
    """Draws held-out loss over training tokens: a thin line per run, a thick one for the mean of each model's runs.

    Args:
        runs: by the model's name, the rows of its runs (with ``tokens`` and ``val_loss``), evaluated at the same steps.
        path: PNG to write.
        title: of the picture.

    Raises:
        ValueError: without a run, or if a model's runs were evaluated at different steps.
    """
    if not runs or not all(runs.values()):
        raise ValueError("runs must hold at least one run of each model, got none")
    for name, seeds in runs.items():
        if len({tuple(row.tokens for row in rows if row.val_loss is not None) for rows in seeds}) > 1:
            raise ValueError(f"runs[{name!r}] must be evaluated at the same steps, got other ones")
    figure = require("matplotlib.figure").Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, seeds) in zip(itertools.cycle(_COLOURS), runs.items(), strict=False):
        curves = [[row for row in rows if row.val_loss is not None] for rows in seeds]
        tokens = [row.tokens / 1e6 for row in curves[0]]
        for curve in curves:
            axes.plot(tokens, [row.val_loss for row in curve], color=colour, linewidth=0.8, alpha=0.5)
        mean = [sum(row.val_loss for row in rows) / len(rows) for rows in zip(*curves, strict=True)]
        axes.plot(tokens, mean, color=colour, linewidth=2.2, label=f"{name}: {mean[-1]:.3f} at the end")
        axes.plot(tokens[-1:], mean[-1:], "o", color=colour, markersize=5)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(title="mean of the seeds; thin: each seed" if max(map(len, runs.values())) > 1 else None)
    figure.savefig(path)
