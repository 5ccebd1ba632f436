"""What all benchmarks share: timing, the copy speed that floors are taken at, and rows of results."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--seconds", type=float, default=1.0, help="measuring time for each figure, in seconds")
    p.add_argument("--csv", type=Path, help="file to append the rows to")
    return p


def samples_ms(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Times of a call in milliseconds, after a warm-up, ten at least: CUDA events, or the clock on a CPU.

    On CUDA the device sleeps for as long as the host needs to enqueue the call, so that the events enclose device time
    alone, as in a training loop whose host runs ahead.
    """
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        cycles = int(3e9 * (time.perf_counter() - begin))  # at most 2 GHz: half as long again as the host needs
        while time.perf_counter() < end or len(times) < 10:
            torch.cuda._sleep(cycles)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    else:
        while time.perf_counter() < end or len(times) < 10:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median of :func:`samples_ms`."""
    return statistics.median(samples_ms(call, device, seconds))


def medians_ms(calls: list[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Median time of each call. On a CPU they are timed in turns, so that all share what else the machine does."""
    turns = 1 if device.type == "cuda" else 5
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, own in zip(calls, times, strict=True):
            own += samples_ms(call, device, seconds / turns)
    return [statistics.median(own) for own in times]


def copy_call(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A call that copies a tensor of this size, and the bytes that it reads and writes."""
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size()


def copy_gb_per_s(elements: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Speed of copying a tensor of this size, counting the bytes read and the bytes written."""
    call, moved = copy_call(elements, dtype, device)
    return moved / median_ms(call, device, seconds) / 1e6


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory that a call allocates beyond what is there before it, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(": ", 1)[1] for x in info.read_text().splitlines() if x.startswith("model name")), model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash of the measured commit, with a plus where the tree differs from it; empty outside of git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head, dirty = (
            subprocess.run([*git, *command.split()], capture_output=True, text=True, check=True).stdout
            for command in ("rev-parse --short HEAD", "status --porcelain -uno")
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if dirty.strip() else "")


def write_rows(rows: list[dict], path: Path | None, device: torch.device) -> None:
    """Appends rows to a CSV file, with what they were measured on."""
    if path is None or not rows:
        return
    context = {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    new = not path.exists()
    columns = [*rows[0], *context]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not new and (there := path.open().readline().rstrip("\n")) != ",".join(columns):
        raise SystemExit(f"{path} has other columns than the new rows, {','.join(columns)}: it has {there}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**row, **context} for row in rows)


def check_outputs(method: str, outputs: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Raises unless every output is what is expected, but for the rounding of dtype."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for y, z in zip(outputs, expected, strict=True):
        error = ((y.double() - z).abs().max() / z.abs().max()).item()
        assert error < tolerance, f"{method}: relative error {error}"


def row_names(
    op: str, method: str, kind: str, dtype: torch.dtype, tokens: int, width: int, sources: int, ways: int
) -> dict[str, object]:
    """The columns that say what a row measures, as far as all operators have them."""
    return {
        "op": op,
        "method": method,
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "D": width,
        "S": sources,
        "C": ways,
    }


class Figure(NamedTuple):
    """What becomes a row."""

    names: dict[str, object]  # the columns that say what is measured
    calls: list[Callable[[], object]]  # they do the same: the fastest counts
    moved: float  # bytes that they cannot do without moving


def result_rows(
    figures: list[Figure], copied: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, object]]:
    """The rows of figures that belong together; floors are at the speed of copying so many elements."""
    copy, copy_bytes = copy_call(copied, dtype, device)
    copy_ms, *times = medians_ms([copy, *(call for f in figures for call in f.calls)], device, seconds)
    rows, left = [], iter(times)
    for names, calls, moved in figures:
        ms, best = min(((next(left), call) for call in calls), key=lambda pair: pair[0])
        memory, floor_ms = peak_memory_mib(best, device), moved / copy_bytes * copy_ms
        rows.append(
            {
                **names,
                "ms": round(ms, 4),
                "gb_per_s": round(moved / ms / 1e6, 1),
                "floor_ms": round(floor_ms, 4),
                "fraction_of_floor": round(floor_ms / ms, 3),
                "peak_mib": "" if memory is None else round(memory, 1),
            }
        )
    return rows


def measure_shapes(
    description: str, measure: Callable[..., list[dict]], sources: list[int], shapes: list[str], dtypes: list[str]
) -> None:
    """The main function of an operator's benchmark: measures every shape, prints and writes the rows.

    Args:
        measure: called with tokens, D, S, dtype, device, seconds and methods; returns the rows of the shape.
        sources, shapes, dtypes: defaults of the options.
    """
    p = parser(description)
    p.add_argument("--sources", type=int, nargs="+", default=sources, help="numbers of sources S")
    p.add_argument("--shapes", nargs="+", default=shapes, help="tokens x D")
    p.add_argument("--methods", nargs="+", default=["eager", "compile", "ours"], help="what to measure")
    p.add_argument("--dtypes", nargs="+", default=dtypes, help="names of torch dtypes")
    args = p.parse_args()
    device = torch.device(args.device)
    print("      shape     dtype   S   method     kind        ms    floor of floor    GB/s")
    for dtype in args.dtypes:
        for shape in args.shapes:
            tokens, width = map(int, shape.split("x"))
            for count in args.sources:
                rows = measure(tokens, width, count, getattr(torch, dtype), device, args.seconds, args.methods)
                for r in rows:
                    print(
                        f"{shape:>11} {dtype:>9} {count:>3} {r['method']:>8} {r['kind']:>8} {r['ms']:>9.4f} "
                        f"{r['floor_ms']:>8.4f} {r['fraction_of_floor']:>8.3f} {r['gb_per_s']:>7.1f} "
                        f"{r.get('norms', '')}".rstrip(),
                        flush=True,
                    )
                write_rows(rows, args.csv, device)
