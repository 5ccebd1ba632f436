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
STEPS = {  # method of train_step.py: label, colour
    "plain-compile": ("plain Transformer++", "#d5d8dc"),
    "naive-eager": ("MUDD in PyTorch, eager", "#9aa0a6"),
    "naive-compile": ("MUDD in PyTorch, torch.compile", "#6fa8dc"),
    "mudd-compile": ("MUDD, ours", "#2e7d32"),
}


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


def step_bars(name: str) -> None:
    """Throughput and peak memory of a training step beside the plain twin's, for each size of the model."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys((r["model"], r["batch"]) for r in rows if r["method"] == "mudd-compile"))
    at = {(r["model"], r["batch"], r["method"]): r for r in rows}  # of a method measured again the last row counts
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, quantity in zip(axes, ("throughput", "memory"), strict=True):
        for i, (method, (label, colour)) in enumerate(STEPS.items()):
            found = [at.get((*model, method), {}) for model in models]
            heights = [float(r.get(f"{quantity}_of_plain") or 0) for r in found]
            places = [j + (i - 1.5) * 0.22 for j in range(len(models))]
            axis.bar(places, heights, 0.21, color=colour, label=label)
            for x, y, r in zip(places, heights, found, strict=True):  # a method without figures says why
                text, tilt = (f"{y:.2f}", 0) if y else (r.get("status", "not measured"), 90)
                dark = y and method == "mudd-compile"
                axis.text(x, 0.02, text, ha="center", fontsize=6.5, rotation=tilt, color="white" if dark else "black")
        if quantity == "throughput":
            for kind, style, label in (("rmw", "-", "bytes allow"), ("deferred", ":", "bytes allow, deferred flush")):
                for j, model in enumerate(models):
                    bound = at[(*model, "mudd-compile")].get(f"bound_{kind}")
                    if bound:
                        axis.hlines(
                            float(bound), j + 0.2, j + 0.46, "black", style, label=None if j else label, linewidth=1
                        )
        axis.set_xticks(range(len(models)), [f"{size}, batch {batch}" for size, batch in models], fontsize=7.5)
        axis.set_title("throughput" if quantity == "throughput" else "peak memory", fontsize=9)
        axis.set_ylabel("plain twin = 1")
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])
        axis.legend(fontsize=6.5, loc="upper left", ncols=2)
    title = f"A training step, sequences of {rows[0]['length']} tokens, bfloat16 autocast"
    figure.suptitle(f"{title}\n{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)


def kind_bars(name: str) -> None:
    """What each kind of kernel adds to a plain step or takes from it, for each size of the model."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["category"] != "step" and "mudd-compile" in r["methods"]]
    models = list(dict.fromkeys((r["model"], r["batch"]) for r in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 3.4), constrained_layout=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        found = [r for r in rows if (r["model"], r["batch"]) == model]
        found = [r for r in found if max(abs(float(r[k])) for k in ("plain_ms", "mudd_ms")) >= 0.005][::-1]
        more = [float(r["difference_ms"]) for r in found]
        drawn = axis.barh([r["category"] for r in found], more, color=["#2e7d32" if x > 0 else "#6fa8dc" for x in more])
        axis.bar_label(drawn, [f"{x:+.2f}" for x in more], fontsize=6.5, padding=2)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"milliseconds, sum {sum(more):+.2f}", fontsize=8)
        axis.set_title(f"{model[0]}, batch {model[1]}", fontsize=9)
    figure.suptitle(f"MUDD step minus plain step, by kind of kernel; {rows[0]['device']}", fontsize=9)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)


if __name__ == "__main__":
    shape = {"tokens": "8192", "D": "2048", "dtype": "bfloat16"}
    bars(
        "h100_depth_aggregate",
        ("forward", "both"),
        shape,
        "Aggregation over depth, bfloat16, 8192 tokens x 2048, 4 ways",
    )
    for draw, name in ((step_bars, "h100_train_step"), (kind_bars, "h100_profile_step")):
        if (RESULTS / f"{name}.csv").exists():
            draw(name)
