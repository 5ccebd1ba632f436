"""Pictures of docs/performance.md, made from the CSV files in benchmarks/results alone.

python benchmarks/plot.py
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import RESULTS, fair_twin, latest, profiles, read, read_gpus, step_run, step_runs

METHODS = {"eager": "#9aa0a6", "compile": "#6fa8dc", "ours": "#2e7d32"}
STEPS = {  # method of train_step.py: label, colour
    "plain-compile": ("plain Transformer++", "#d5d8dc"),
    "plain16-compile": ("plain, bfloat16 residual stream", "#9aa0a6"),
    "mudd-compile": ("MUDD", "#2e7d32"),
    "prepost-compile": ("MUDD, PrePostDANorm", "#81c784"),
}


def save(figure: plt.Figure, name: str) -> None:
    """As small as it can be read: the pictures are in the repository."""
    figure.savefig(RESULTS / f"{name}.png", dpi=110, pil_kwargs={"optimize": True})
    plt.close(figure)


def bars(subject: str, kinds: tuple[str, str], where: dict[str, str], title: str) -> None:
    """Milliseconds for each number of sources: eager, torch.compile and ours side by side, and the floor in bytes."""
    rows = [r for r in read_gpus(subject) if all(r[k] == v for k, v in where.items())]
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
    save(figure, subject)


def step_bars() -> None:
    """Time and peak memory of a training step: the plain twins and ours, of one run for each size and model of ours."""
    runs = step_runs(read_gpus("train_step"))
    ours = [run["mudd-compile"] for run in runs if "mudd-compile" in run and fair_twin(run, "compile")]
    sizes = dict.fromkeys((row["model"], row["batch"]) for row in ours if row["status"] == "ok")
    chosen = {size: step_run(runs, size, "mudd-compile") for size in sorted(sizes)}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    for axis, (column, title) in zip(axes, {"ms": "milliseconds", "peak_gib": "peak memory, GiB"}.items(), strict=True):
        for i, (method, (label, colour)) in enumerate(STEPS.items()):
            heights = {j: run[method][column] for j, run in enumerate(chosen.values()) if method in run}
            heights = {j: float(height) for j, height in heights.items() if height}
            places = [j + (i - 1.5) * 0.22 for j in heights]
            drawn = axis.bar(places, list(heights.values()), 0.21, color=colour, label=label if heights else None)
            axis.bar_label(drawn, [f"{height:.3g}" for height in heights.values()], fontsize=6.5)
        axis.set_xticks(range(len(chosen)), [f"{size}, batch {batch}" for size, batch in chosen], fontsize=7.5)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=6.5, loc="upper left")
    rows = [run["mudd-compile"] for run in chosen.values()]
    title = f"A training step, sequences of {rows[0]['length']} tokens, bfloat16 autocast, whole model compiled"
    devices, versions = (", ".join(dict.fromkeys(row[k] for row in rows)) for k in ("device", "torch"))
    figure.suptitle(f"{title}\n{devices}, torch {versions}", fontsize=9)
    save(figure, "train_step")


def kind_bars() -> None:
    """What each kind of kernel adds to a plain step or takes from it, for each pair of models that was profiled."""
    pairs = profiles()
    figure, axes = plt.subplots(1, len(pairs), figsize=(5 * len(pairs), 3.4), constrained_layout=True, squeeze=False)
    for axis, ((model, batch, run, methods), rows) in zip(axes[0], pairs.items(), strict=True):
        found = [r for r in rows if r["category"] != "step"]
        found = [r for r in found if max(abs(float(r[k])) for k in ("plain_ms", "mudd_ms")) >= 0.005][::-1]
        more = [float(r["difference_ms"]) for r in found]
        drawn = axis.barh([r["category"] for r in found], more, color=["#2e7d32" if x > 0 else "#6fa8dc" for x in more])
        axis.bar_label(drawn, [f"{x:+.2f}" for x in more], fontsize=6.5, padding=2)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"milliseconds, sum {sum(more):+.2f}", fontsize=8)
        title = f"{model}, batch {batch}, {run}, {rows[0]['device']}\n{methods.replace(' ', ' to ')}"
        axis.set_title(title, fontsize=8)
    figure.suptitle("What the connections add, by kind of kernel", fontsize=9)
    save(figure, "profile_step")


def ways_to_train() -> dict[str, tuple[float, float]]:
    """By way to run a step on H200s: milliseconds of the plain model with a bfloat16 residual stream, and MUDD's."""
    found = {}
    runs = step_runs(read("h200_train_step"))
    for how, name in {"eager": "eager", "block": "every block\ncompiled", "compile": "whole model\ncompiled"}.items():
        pair = (f"plain16-{how}", f"mudd-{how}")
        run = [r for r in runs if all(m in r and r[m]["model"] == "24x1024" for m in pair)][-1]
        found[f"{name}\n24x1024"] = tuple(float(run[m]["ms"]) for m in pair)
    same = {"size": "24L x 1024", "batch": "8", "tokens": "2048", "dtype": "bfloat16"}
    cpp = latest((r for r in read("h200_cpp_step") if same.items() <= r.items()), "model", "language")
    pair = tuple(float(cpp[m, "C++"]["step ms"]) for m in ("plain16", "MUDD"))
    found["C++\n24x1024"] = pair
    shards = {r["method"]: float(r["ms"]) for r in read("h200_fsdp2_step") if r["model"] == "24x2048"}
    for how, name in {"eager": "eager", "block": "blocks compiled"}.items():
        found[f"FSDP2, two GPUs\n{name}\n24x2048"] = (shards[f"plain-{how}"], shards[f"mudd-{how}"])
    return found


def ways_bars(name: str) -> None:
    """A training step of the plain model and of MUDD in every way to run it."""
    ways = ways_to_train()
    figure, axis = plt.subplots(figsize=(9, 3.6), constrained_layout=True)
    for i, (label, colour) in enumerate({"plain, bfloat16 residual stream": "#9aa0a6", "MUDD": "#2e7d32"}.items()):
        places = [j + 0.4 * i - 0.2 for j in range(len(ways))]
        heights = [both[i] for both in ways.values()]
        axis.bar_label(axis.bar(places, heights, 0.38, color=colour, label=label), fmt="%.1f", fontsize=7)
    axis.set_xticks(range(len(ways)), list(ways), fontsize=7.5)
    axis.set_ylabel("milliseconds")
    axis.margins(y=0.12)
    axis.legend(fontsize=7, loc="upper left")
    figure.suptitle("A training step in every way to run it, H200", fontsize=9)
    save(figure, name)


if __name__ == "__main__":
    shape = {"tokens": "8192", "D": "2048", "dtype": "bfloat16"}
    bars(
        "depth_aggregate",
        ("forward", "both"),
        shape,
        "Aggregation over depth, bfloat16, 8192 tokens x 2048, 4 ways",
    )
    step_bars()
    kind_bars()
    ways_bars("step_ways")
