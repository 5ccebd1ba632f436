"""Pictures of the README, made from the CSV files in benchmarks/results alone.

python benchmarks/plot.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {"eager": "#9aa0a6", "compile": "#6fa8dc", "ours": "#2e7d32"}


def bars(name: str, kinds: tuple[str, str], where: dict[str, str], title: str) -> None:
    """Milliseconds for each number of sources: eager, torch.compile and ours side by side, and the floor in bytes."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if all(r[k] == v for k, v in where.items())]
    sources = sorted({int(r["S"]) for r in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(9, 3.2), constrained_layout=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for i, (method, colour) in enumerate(METHODS.items()):
            at = {int(r["S"]): float(r["ms"]) for r in rows if r["method"] == method and r["kind"] == kind}
            places = [j + (i - 1) * 0.27 for j in range(len(sources))]
            drawn = axis.bar(places, [at[s] for s in sources], 0.25, color=colour, label=method)
            axis.bar_label(drawn, [f"{at[s]:.3g}" for s in sources], fontsize=6.5)
        floor = {int(r["S"]): float(r["floor_ms"]) for r in rows if r["method"] == "ours" and r["kind"] == kind}
        for j, s in enumerate(sources):
            axis.hlines(
                floor[s], j - 0.42, j + 0.42, colors="black", linewidth=1, label=None if j else "floor (copy speed)"
            )
        axis.set_xticks(range(len(sources)), [str(s) for s in sources])
        axis.set_xlabel("sources S")
        axis.set_ylabel("milliseconds")
        axis.set_title("forward" if kind == "forward" else "forward + backward", fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(f"{title}\n{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)


if __name__ == "__main__":
    shape = {"tokens": "8192", "D": "2048", "dtype": "bfloat16"}
    bars(
        "h100_depth_aggregate",
        ("forward", "both"),
        shape,
        "Aggregation over depth, bfloat16, 8192 tokens x 2048, 4 ways",
    )
