"""Pictures of what connections do, made from arrays alone (:class:`muddformer.inference.Inspection` has them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require

__all__ = ["plot_connection_weights", "plot_history_norms", "plot_similarities", "plot_sinks"]

_WAY_NAMES = {"q": "query", "k": "key", "v": "value", "r": "residual", "x": "hidden state"}


def plot_connection_weights(
    means: Mapping[int, Any],
    stds: Mapping[int, Any],
    plan: Mapping[int, Sequence[int]],
    ways: Mapping[int, str],
    path: Path,
    title: str = "",
) -> None:
    """Draws mean and standard deviation of the connection weights: a column for each way, sources over layers.

    Args:
        means, stds: arrays [C, S] by aggregation i.
        plan: hidden states j of its S columns, by i.
        ways: names of its C rows, a part of ``"qkvr"``, by i.
        path: PNG to write.
        title: of the picture.
    """
    shown = [way for way in "qkvr" if any(way in names for names in ways.values())]
    figure, axes = _figure(2, len(shown), 3.2, 3.0)
    size = max(plan) + 1
    for row, (values, label) in enumerate(((means, "mean"), (stds, "standard deviation"))):
        for column, way in enumerate(shown):
            grid = np.full((size, size), np.nan)
            for i, names in ways.items():
                if way in names:
                    grid[i, list(plan[i])] = np.asarray(values[i])[names.index(way)]
            limit = float(np.nanmax(np.abs(grid))) or 1.0
            style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if row == 0 else {"cmap": "viridis", "vmin": 0}
            _matrix(figure, axes[row][column], grid, **style)
            axes[row][column].set_title(f"{_WAY_NAMES[way]}, {label}", fontsize=9)
            axes[row][column].set_xlabel("source $X_j$", fontsize=8)
            axes[row][column].set_ylabel("after block", fontsize=8)
    _save(figure, path, title)


def plot_similarities(similarities: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draws the cosine similarities between the streams of any two blocks.

    Args:
        similarities: by name (``"q"``, ``"k"``, ``"v"``, ``"x"``) an array [L, L].
        path: PNG to write.
        title: of the picture.
    """
    figure, axes = _figure(1, len(similarities), 3.2, 3.0)
    for place, (name, values) in enumerate(similarities.items()):
        _matrix(figure, axes[0][place], np.asarray(values), cmap="viridis", vmin=0, vmax=1)
        axes[0][place].set_title(_WAY_NAMES.get(name, name), fontsize=9)
        axes[0][place].set_xlabel("block", fontsize=8)
    _save(figure, path, title)


def plot_sinks(sinks: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draws how much attention the heads pay to the first token: a point for each head, a line for a block's mean.

    Args:
        sinks: by the model's name an array [L, H], shares from 0 to 1.
        path: PNG to write.
        title: of the picture.
    """
    figure, axes = _figure(1, 1, 8, 4)
    for name, values in sinks.items():
        array = np.asarray(values)
        blocks = np.arange(len(array))
        (line,) = axes[0][0].plot(blocks, array.mean(1), linewidth=2, label=f"{name}: {array.mean():.1%} on average")
        axes[0][0].plot(np.repeat(blocks, array.shape[1]), array.ravel(), ".", color=line.get_color(), alpha=0.35)
    _finish(axes[0][0], "block", "attention to the first token")
    _save(figure, path, title)


def plot_history_norms(norms: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draws the root mean square of the hidden states.

    Args:
        norms: by a name (a model, or a step of training) an array [L + 1] of X_0 .. X_L.
        path: PNG to write.
        title: of the picture.
    """
    figure, axes = _figure(1, 1, 8, 4)
    for name, values in norms.items():
        axes[0][0].plot(np.asarray(values), marker=".", label=name)
    axes[0][0].set_yscale("log")
    _finish(axes[0][0], "hidden state $X_i$", "root mean square")
    _save(figure, path, title)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    size = (width * columns, height * rows)
    figure = require("matplotlib.figure").Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _matrix(figure: Any, axes: Any, values: Any, **style: Any) -> None:
    figure.colorbar(axes.imshow(values, interpolation="nearest", **style), ax=axes, shrink=0.8).ax.tick_params(
        labelsize=7
    )
    axes.tick_params(labelsize=7)


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend()


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
