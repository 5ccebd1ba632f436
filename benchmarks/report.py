"""Writes the tables of README.md and docs/ from the CSV files in benchmarks/results alone.

A table stands in a page between <!-- table: NAME --> and <!-- end -->, NAME being a key of TABLES; all else in the page
is written by hand. Of figures that were measured again the last ones count.

A ratio to the plain model is one to the faster of its two twins: "plain", whose residual stream is float32 under
autocast, and "plain16", whose residual stream is bfloat16 like the hidden states of the connections. Both must be of
the same run (rows that follow each other with one model, batch, device, torch, commit and date); otherwise no ratio is
printed.

    python benchmarks/report.py            writes the pages
    python benchmarks/report.py --check    exit code 1 if a page is not what the CSV files give
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tables import (
    NONE,
    RESULTS,
    Line,
    Row,
    fair_twin,
    fraction,
    latest,
    number,
    profiles,
    ratio,
    read,
    read_gpus,
    several,
    step_run,
    step_runs,
    table,
    together,
)  # fmt: skip

ROOT = RESULTS.parent.parent
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


# ---- training steps ---------------------------------------------------------------------------------------------
FORMS = {"mudd": "MUDD", "prepost": "MUDD, PrePostDANorm", "2x2": "MUDD, k x p = 2 x 2"}
RUNS = {
    "compile": "whole model compiled",
    "block": "every block compiled",
    "eager": "eager",
    "graphs": "compiled, in CUDA graphs",
    "ckpt": "compiled, activation checkpointing",
    "selective": "compiled, selective checkpointing",
}


def step_line(run: dict[str, Row], method: str, short: bool) -> Line:
    """A model of ours beside its twins."""
    form, _, how = method.rpartition("-")
    row, twin = run[method], fair_twin(run, how)
    both = [run.get(f"{name}-{how}") for name in ("plain", "plain16")]
    cells = [f"{row['model'].replace('x', ' x ')}, {row['batch']}", FORMS[form]]
    cells += [NONE if r is None else f"{number(r['ms'])}, {number(r['peak_gib'])}" for r in (*both, row)]
    cells += [ratio(twin and twin["ms"], row["ms"]), ratio(row["peak_gib"], twin and twin["peak_gib"])]
    if not short:
        cells.insert(2, RUNS[how])
        kinds = ("rmw", "deferred")
        bounds = (ratio(twin["ms"], float(twin["ms"]) + float(row[f"bytes_{k}_ms"])) if twin else NONE for k in kinds)
        cells += [f"{number(row['bytes_rmw_ms'])}, {number(row['bytes_deferred_ms'])}", ", ".join(bounds)]
        cells.append(several([both[0], row], "first_step_s"))
    return cells, [row, *(r for r in both if r)]


def steps(hows: Sequence[str], short: bool = False) -> str:
    """A line for each size and form; the short table has those of 24 layers and more alone, beside both twins."""
    rows = read_gpus("train_step")
    runs = step_runs(rows)
    lines = []
    for size in latest((r for r in rows if not r["method"].startswith("plain")), "model", "batch"):
        for method in (f"{form}-{how}" for how in hows for form in FORMS):
            run = step_run(runs, size, method)
            if not run or run[method]["status"] != "ok":
                continue
            if not short or (width(run[method])[1] >= 24 and fair_twin(run, method.rpartition("-")[2])):
                lines.append(step_line(run, method, short))
    head = ["layers x width, batch", "model", *(f"{name}: ms, GiB" for name in ("plain", "plain16", "ours"))]
    head += ["throughput", "memory"]
    if not short:
        head.insert(2, "run")
        head += ["history at copy speed, ms", "bytes alone would allow", "first step, s: plain, ours"]
    return table(head, sorted(lines, key=lambda line: width(line[1][0])), 2 if short else 3)


def width(row: Row) -> tuple[int, int]:
    layers, _, dim = row["model"].partition("x")
    return int(dim), int(layers)


def other_steps() -> str:
    """Models of others, and ours with the connections in plain PyTorch, beside ours of the same run."""
    names = {
        "naive-eager": "MUDD in plain PyTorch, eager",
        "naive-compile": "MUDD in plain PyTorch, compiled",
        "llama-compile": "Hugging Face LlamaForCausalLM, compiled",
        "plain+use_qk_norm=false-compile": "plain without norms of q and k, compiled",
    }
    lines = []
    for run in step_runs(read_gpus("train_step")):
        for method in names.keys() & run.keys():
            row = run[method]
            ms = number(row["ms"]) if row["status"] == "ok" else row["status"]
            cells = [row["model"].replace("x", " x "), names[method], ms, number(row["peak_gib"])]
            ours = [run.get("plain-compile"), run.get("mudd-compile")]
            cells += [NONE if r is None else f"{number(r['ms'])}, {number(r['peak_gib'])}" for r in ours]
            lines.append((cells, [row]))
    head = ["layers x width", "model", "ms", "GiB", "plain of that run: ms, GiB", "MUDD: ms, GiB"]
    return table(head, sorted(lines, key=lambda line: (width(line[1][0]), line[0][1])), 2)


def profile() -> str:
    """Milliseconds of a step by kind of kernel, a table for each pair of models."""
    parts = []
    for (model, batch, run, methods), rows in profiles().items():
        plain, ours = methods.split()
        history = [r for r in rows if r["category"].startswith(("aggregation", "flush"))]
        total = {k: str(sum(float(r[k]) for r in history)) for k in ("plain_ms", "mudd_ms", "difference_ms")}
        lines = []
        for r in [*rows, {**rows[0], **total, "category": "aggregation and flush together"}]:
            if not (float(r["plain_ms"]) or float(r["mudd_ms"])):
                continue
            both = (number(r[k]) if float(r[k]) else NONE for k in ("plain_ms", "mudd_ms"))
            lines.append(([r["category"], *both, f"{float(r['difference_ms']):+.2f}"], [r]))
        where = "" if run == "Python" else f", {run}"
        head = [f"{model.replace('x', ' x ')}, batch {batch}{where}", plain, ours, "difference"]
        parts.append(table(head, lines))
    return "\n".join(parts)


def follow() -> str:
    """Losses of the operators beside those of the plain formulation, step by step."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in read_gpus("follow_naive"):
        runs.setdefault((row["dtype"], row["seed"]), []).append(row)

    def distance(rows: Sequence[Row], a: str, others: Sequence[Row], b: str) -> list[float]:
        return [abs(float(x[a]) - float(y[b])) for x, y in zip(rows, others, strict=True)]

    lines = []
    for (dtype, seed), rows in runs.items():
        own = distance(rows, "fast", rows, "naive")
        other = next(theirs for (d, s), theirs in runs.items() if d == dtype and s != seed)
        seeds = statistics.mean(distance(rows, "naive", other, "naive"))
        cells = [dtype, seed, *(f"{x:.1e}" for x in (max(own[:20]), statistics.mean(own), seeds))]
        lines.append((cells, [rows[0]]))
    return table(["dtype", "seed", "first 20 steps, at most", "all steps, mean", "two seeds, mean"], lines)


# ---- operators --------------------------------------------------------------------------------------------------
KINDS = {"forward": "forward", "both": "forward + backward", "chained": "with chained gradients"}


def order(key: tuple[str, ...]) -> tuple:
    """float32 first, then by size."""
    return (key[0] != "float32", key[0], *map(int, key[1:4]), *key[4:])


def operator(rows: Sequence[Row], kinds: Sequence[str], **where: str) -> str:
    """Eager, torch.compile and ours, the fraction of the floor, and how many times as fast as torch.compile.

    Args:
        rows: of its CSV files.
        kinds: keys of KINDS.
        where: values of columns that a row must have. Sizes of which ours alone was measured are left out.
    """
    rows = [row for row in rows if all(row[column] == value for column, value in where.items())]
    others = [row for row in rows if row["method"] in ("eager", "compile")]
    found = latest(rows, "dtype", "tokens", "D", "S", "device", "kind", "method")
    lines = []
    for key in sorted(latest(others, "dtype", "tokens", "D", "S", "device"), key=order):
        cells, used = [f"{key[0]}, {key[1]} x {key[2]}", key[3]], []
        for kind in kinds:
            eager, compiled, ours = (found.get((*key, kind, method)) for method in ("eager", "compile", "ours"))
            used += [r for r in (eager, compiled, ours) if r]
            if kind == "chained":
                cells += [number(ours and ours["ms"]), fraction(ours)]
            else:
                cells += [several([eager, compiled, ours], "ms"), fraction(ours)]
                cells.append(ratio(compiled["ms"], ours["ms"], 2) if together(compiled, ours) else NONE)
        lines.append((cells, used))
    head = ["dtype, tokens x D", "S"]
    for kind in kinds:
        if kind == "chained":
            head += [f"{KINDS[kind]}: ours, ms", "of the floor"]
        else:
            head += [f"{KINDS[kind]}: eager, compile, ours, ms", "of the floor", "compile / ours"]
    return table(head, lines)


def aggregate_kernels() -> str:
    """The launchers alone: of every shape forward and backward, the fastest path and the one before Hopper."""
    found = latest(read_gpus("aggregate_kernels"), "dtype", "tokens", "D", "C", "S", "op", "path")
    lines = []
    for key in dict.fromkeys(key[:5] for key in found):
        dtype, tokens, dim, ways, sources = key
        if (dtype, tokens, ways) != ("bfloat16", "8192", "4") or (dim != "2048" and sources != "33"):
            continue
        cells, used = [f"{tokens} x {dim}", sources], []
        for op in ("forward", "backward"):
            ring, vector = found.get((*key, op, "automatic")), found.get((*key, op, "vector"))
            used += [r for r in (ring, vector) if r]
            cells += [number(ring and ring["ms"]), fraction(ring), fraction(vector)]
        lines.append((cells, used))
    head = ["tokens x D", "S"]
    for op in ("forward", "backward"):
        head += [f"{op}, ms", "of the floor", "16-byte loads, of the floor"]
    lines.sort(key=lambda line: (int(line[0][0].split()[-1]), int(line[0][1])))
    return table(head, lines)


def aggregate_norm() -> str:
    """Forward and backward of the normed aggregation, for the norms of q, k, v and with PrePostDANorm's."""
    rows = [row for row in read_gpus("depth_aggregate_norm") if row["method"] == "ours"]
    found = latest(rows, "tokens", "D", "S", "device", "norms", "kind")
    lines = []
    for key in sorted(latest(rows, "tokens", "D", "S", "device"), key=lambda k: (k[3], int(k[1]), int(k[2]))):
        cells, used = [f"{key[0]} x {key[1]}", key[2]], []
        for norms in ("qkv", "pre-post"):
            for kind in ("forward", "backward", "deferred"):
                row = found.get((*key, norms, kind))
                used += [row] if row else []
                cells.append(f"{number(row['ms'])}, {fraction(row)}" if row else NONE)
        lines.append((cells, used))
    names = ("q, k, v", "pre- and post-norm")
    head = ["tokens x D", "S", *(f"{n}: {k}" for n in names for k in ("forward", "backward", "deferred"))]
    return table(head, lines)


def with_norms(norms: str) -> str:
    """The normed aggregation with these norms: eager, torch.compile and ours."""
    return operator(read_gpus("depth_aggregate_norm"), ["forward", "both"], norms=norms)


def flush() -> str:
    rows = read_gpus("deferred_flush")
    found = latest(rows, "tokens", "D", "S", "device", "kind", "method")
    lines = []
    for key in latest(rows, "tokens", "D", "S", "device"):
        names = [("flush", "eager"), ("flush", "compile"), ("flush", "ours"), ("group", "single"), ("group", "ours")]
        made = [found.get((*key, *name)) for name in names]
        cells = [f"{key[0]} x {key[1]}", key[2], several(made[:3], "ms"), fraction(made[2])]
        cells += [several(made[3:], "ms"), ratio(made[4]["ms"], made[3]["ms"]) if together(made[3], made[4]) else NONE]
        lines.append((cells, [r for r in made if r]))
    head = [
        "tokens x D",
        "S",
        "flush: eager, compile, ours, ms",
        "of the floor",
        "group of four: each layer, deferred, ms",
    ]
    return table([*head, "deferred / each layer"], lines)


def decode() -> str:
    rows = read_gpus("decode")
    found = latest(rows, "batch", "norm", "method")
    lines = []
    for (batch,) in latest(rows, "batch"):
        made = [found.get((batch, norm, m)) for m in ("eager", "compile", "ours") for norm in ("none", "rms")]
        lines.append(([batch, *(several(made[i : i + 2], "us") for i in (0, 2, 4))], [r for r in made if r]))
    head = [f"{m}: without, with norms, us" for m in ("eager", "torch.compile", "ours")]
    return table(["tokens", *head], lines, 0)


# ---- the rest ---------------------------------------------------------------------------------------------------
def cpp_step() -> str:
    rows = read("cpu_cpp_step") + read_gpus("cpp_step")
    found = latest(rows, "size", "batch", "tokens", "dtype", "model", "language")
    lines = []
    for key in latest(rows, "size", "batch", "tokens", "dtype", "model"):
        made = [found.get((*key, language)) for language in ("C++", "Python")]
        cells = [f"{key[0]}, {key[1]} x {key[2]}, {key[3]}", key[4]]
        cells += [several(made, column) for column in ("step ms", "peak MiB", "process MiB")]
        lines.append((cells, [r for r in made if r]))
    head = ["size, batch x tokens, dtype", "model"]
    return table([*head, *(f"{x}: C++, Python" for x in ("step, ms", "tensors, MiB", "process, MiB"))], lines, 2)


def fsdp2_step() -> str:
    lines = []
    for r in latest(read_gpus("fsdp2_step"), "model", "method").values():
        model, _, run = r["method"].rpartition("-")
        cells = [f"{r['model'].replace('x', ' x ')}, {r['batch']} a device", FORMS.get(model, model), RUNS[run]]
        rounds = f"{number(r['ms_low'])} to {number(r['ms_high'])}" if r["ms_low"] else NONE
        cells += [number(r["ms"]), rounds, *(number(r[column]) for column in ("host_ms", "peak_gib"))]
        ours = [number(r[column]) for column in ("throughput_of_plain", "memory_of_plain", "bytes_deferred_ms")]
        lines.append(([*cells, *(ours if model in FORMS else [NONE] * 3)], [r]))
    head = ["layers x width, batch", "model", "run", "ms", "of the rounds", "of the host, ms", "GiB a device"]
    return table([*head, "throughput", "memory", "history at copy speed, ms"], lines, 3)


def transformers() -> str:
    names = {"train_step": "a step of Trainer, ms", "decode": "generate, tokens/s"}
    found = latest(read_gpus("hf"), "layers", "D", "figure", "method")
    lines = []
    for key in dict.fromkeys(k[:3] for k in found):
        ours, theirs = (found[(*key, method)] for method in ("ours", "transformers"))
        cells = [f"{key[0]} x {key[1]}", names[key[2]], number(ours["value"]), number(theirs["value"])]
        lines.append(([*cells, number(theirs["speed"]), number(theirs["target"])], [ours, theirs]))
    head = ["layers x width", "figure", "our loop", "transformers", "speed of transformers", "asked for"]
    return table(head, lines, 2)


def attached() -> str:
    runs = {"eager": "eager", "block": "every layer compiled", "compile": "whole model compiled"}
    found = latest(read_gpus("hf_attach"), "model", "batch", "precision", "method")
    lines = []
    for (*where, method), row in found.items():
        form, _, how = method.partition("-")
        if form != "attached":
            continue
        plain = found.get((*where, f"plain-{how}"))
        if not together(plain, row):
            continue
        cells = [f"{where[0].replace('x', ' x ')}, {where[1]}", runs[how], where[2]]
        cells += [f"{number(r['ms'])}, {number(r['peak_gib'])}" for r in (plain, row)]
        cells += [ratio(plain["ms"], row["ms"]), f"{number(row['bound_rmw'])}, {number(row['bound_deferred'])}"]
        lines.append(([*cells, number(row["target"])], [plain, row]))
    head = ["layers x width, batch", "run", "precision", "as it was: ms, GiB", "attached: ms, GiB", "throughput"]
    return table([*head, "bytes alone would allow", "asked for"], lines, 3)


def host_time() -> str:
    found = latest(read("cpu_host_time"), "S", "call")
    lines = []
    for sources in dict.fromkeys(s for s, _ in found):
        rows = [found[sources, name] for name in ("linear", "linear, both", "empty operator")]
        cells = [sources, f"{number(rows[0]['us'])}, {number(rows[1]['us'])}", number(rows[2]["us"])]
        for kind in ("", ", both"):
            node, ours = (found[sources, f"{name}{kind}"] for name in ("empty node", "aggregate"))
            cells += [f"{number(node['us'])}, {number(ours['us'])}", ratio(ours["us"], node["us"], 2)]
            rows += [node, ours]
        lines.append((cells, rows))
    head = ["S", "torch's linear: forward, both, us", "operator that does nothing, us"]
    for kind in ("forward", "forward and backward"):
        head += [f"{kind}: node that does nothing, ours, us", "ours / that"]
    return table(head, lines, 0)


def conversion() -> str:
    lines = []
    for row in latest(read("cpu_convert"), "preset", "source", "in_memory").values():
        cells = [f"{row['preset']}, {row['source']}, {number(row['gb'])} GB", row["in_memory"]]
        cells += [number(row[k]) for k in ("copy_s", "convert_s", "ratio", "target")]
        lines.append(([*cells, f"{int(row['peak_mib']):,}", number(row["peak_of_shard"]), row["target_peak"]], [row]))
    head = ["checkpoint", "in memory before", "copy, s", "convert, s", "ratio", "asked for", "peak memory, MiB"]
    return table([*head, "of the shard", "asked for"], lines, 2)


def cpu_step() -> str:
    lines = []
    for row in latest(read("cpu_step"), "model", "form", "batch", "length", "precision").values():
        cells = [f"{row['model'].replace('x', ' x ')}, {row['batch']} x {row['length']}, {row['precision']}"]
        cells += [row["form"], *(number(row[k]) for k in ("eager_ms", "compile_ms", "eager_of_compile", "target"))]
        lines.append((cells, [row]))
    head = ["layers x width, batch", "model", "eager, ms", "compile, ms", "eager / compile", "asked for"]
    return table(head, lines, 2)


def demo() -> str:
    lines = []
    for r in read("demo"):
        cells = [r["model"], f"{int(r['parameters']):,}", f"{float(r['val_loss']):.3f}", f"{float(r['spread']):.3f}"]
        lines.append(([*cells, f"{float(r['tokens_per_s']):,.0f}", f"{float(r['memory_mib']):,.0f}"], [r]))
    head = ["model", "parameters", "held-out loss, nats", "spread of two seeds", "tokens/s", "peak memory, MiB"]
    return table(head, lines)


# ---- operators of a block ---------------------------------------------------------------------------------------
def methods(subject: str, columns: Sequence[str], kinds: Sequence[str]) -> list[Line]:
    """For each case its columns, and of each kind the times of eager, torch.compile and ours, and our fraction."""
    found = latest(read_gpus(subject), *columns, "kind", "method")
    lines = []
    for key in dict.fromkeys(k[: len(columns)] for k in found):
        cells, used = list(key), []
        for kind in kinds:
            three = [found.get((*key, kind, method)) for method in ("eager", "compile", "ours")]
            used += [row for row in three if row]
            cells += [several(three, "ms"), fraction(three[-1])]
        lines.append((cells, used))
    return lines


def linear() -> str:
    """A linear layer with a residual, beside its products by themselves."""
    lines, head = methods("linear", ("tokens", "in", "out"), ("forward", "both")), ["tokens x in -> out"]
    for cells, used in lines:
        ours = {row["kind"]: row for row in used if row["method"] == "ours"}
        whole = [fraction(ours[kind], "fraction_of_bytes_floor") for kind in ("forward", "both")]
        cells[:] = [f"{cells[0]} x {cells[1]} -> {cells[2]}", *cells[3:5], whole[0], *cells[5:], whole[1]]
    for kind, products in {"forward": "product", "both": "three products"}.items():
        head += [f"{KINDS[kind]}: eager, compile, ours, ms", f"of the {products}", "and of the other bytes"]
    return table(head, lines)


def cross_entropy() -> str:
    """Head and loss, with the memory that each takes."""
    lines = methods("linear_cross_entropy", ("tokens", "D", "V"), ("forward", "both"))
    for cells, used in lines:
        cells[:3] = [f"{cells[0]} x {cells[1]}, {cells[2]} classes"]
        cells.append(several([row for row in used if row["kind"] == "both"], "peak_mib"))
    head = [f"{KINDS[kind]}: eager, compile, ours, ms" for kind in ("forward", "both")]
    memory = "peak memory with gradients: eager, compile, ours, MiB"
    return table(["tokens x D", head[0], "of the floor", head[1], "of the floor", memory], lines)


def block_ops() -> str:
    """The elementwise operators of a block."""
    lines = methods("block_ops", ("tokens", "D", "norms"), ("forward", "backward"))
    for cells, _ in lines:
        cells[:2] = [f"{cells[0]} x {cells[1]}"]
    head = [f"{kind}: eager, compile, ours, ms" for kind in ("forward", "backward")]
    return table(["tokens x D", "operator", head[0], "of the floor", head[1], "of the floor"], lines, 2)


TABLES: dict[str, Callable[[], str]] = {
    "speed": lambda: steps(["compile"], short=True),
    "train_step": lambda: steps(["compile"]),
    "train_step_runs": lambda: steps([how for how in RUNS if how != "compile"]),
    "train_step_others": other_steps,
    "profile_step": profile,
    "follow_naive": follow,
    "aggregate_kernels": aggregate_kernels,
    "depth_aggregate": lambda: operator(read_gpus("depth_aggregate"), ["forward", "both", "chained"]),
    "depth_aggregation": lambda: operator(read_gpus("depth_aggregation"), ["forward", "both"]),
    "depth_aggregate_norm": aggregate_norm,
    "depth_aggregate_norm_compile": lambda: with_norms("qkv"),
    "depth_aggregate_prepost_compile": lambda: with_norms("pre-post"),
    "connection_weights": lambda: operator(read_gpus("connection_weights"), ["forward", "both", "chained"]),
    "deferred_flush": flush,
    "linear": linear,
    "linear_cross_entropy": cross_entropy,
    "block_ops": block_ops,
    "decode": decode,
    "depth_aggregate_cpu": lambda: operator(read("cpu_depth_aggregate"), ["forward", "both", "chained"]),
    "cpp_step": cpp_step,
    "fsdp2_step": fsdp2_step,
    "transformers": transformers,
    "attached": attached,
    "conversion": conversion,
    "host_time": host_time,
    "cpu_step": cpu_step,
    "demo": demo,
}


def filled(text: str, page: Path) -> str:
    """A page with its tables made anew."""
    results = Path(os.path.relpath(RESULTS, page.parent)).as_posix()

    def fill(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise SystemExit(f"{page}: there is no table {found[2]!r}, only {', '.join(TABLES)}")
        return f"{found[1]}\n{TABLES[found[2]]().replace('RESULTS/', results + '/')}\n{found[4]}"

    return MARKED.sub(fill, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check = p.parse_args(arguments).check
    stale = 0
    for page in pages():
        text = page.read_text()
        made = filled(text, page)
        if made == text:
            continue
        stale += 1
        state = "is not what benchmarks/results give: run make report" if check else "written"
        print(f"{page.relative_to(ROOT)}: {state}")
        if not check:
            page.write_text(made)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
