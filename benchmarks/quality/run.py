"""Trains the runs of sets: ``python benchmarks/quality/run.py runs/time-12x512.yaml --corpus PARTS --out FOLDER``.

One run on each GPU at a time. Runs that the rows show as ended are left out; others go on from their checkpoint in
FOLDER, so that the same command, given again after being cut off at any moment, does what is left. Exit status: 0 if
all runs have ended, 1 if one failed, 2 for bad input, 3 if there was no time for all.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from parts import Parts
from rows import read_rows, write_rows
from sets import Run, load_set
from trainer import Trainer

from muddformer.errors import InputError
from muddformer.inference.loading import find_checkpoints
from muddformer.training.state import Checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("sets", type=Path, nargs="+", help="YAML files of runs")
    p.add_argument("--corpus", type=Path, required=True, help="folder of parts that corpus.py made")
    p.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    p.add_argument("--rows", type=Path, help="CSV file of the rows; OUT/rows.csv if it is not given")
    p.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of runs, as --list shows them")
    p.add_argument("--list", action="store_true", help="show the runs and what is left to do, and train none")
    p.add_argument("--seconds", type=float, help="stop after so many, with checkpoints")
    p.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds")
    p.add_argument("--keep", action="store_true", help="keep checkpoints of all evaluations, for inspection.py")
    p.add_argument("--commit", help="of the code, for the rows, on a machine that has no git")
    p.add_argument("--processes", type=int, help="runs at a time, one on a GPU; as many as there are GPUs if not given")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = p.parse_args(arguments)
    begin = time.time()
    try:
        return _run(args, None if args.seconds is None else begin + args.seconds)
    except InputError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, deadline: float | None) -> int:
    runs = {run.id: run for path in args.sets for run in load_set(path).runs}
    runs = {i: r for i, r in runs.items() if any(fnmatch.fnmatch(r.name, only) for only in args.only)}
    rows = args.rows or args.out / "rows.csv"
    parts = Parts(args.corpus)
    todo = unfinished(list(runs.values()), rows, args.out, parts.id, change=not args.list)
    if args.list:
        for run in runs.values():
            print(f"{run.id} {'to do' if run in todo else 'ended'} {run.name}")
        return 0
    there = torch.cuda.device_count() if args.device == "cuda" else args.processes or 1
    if not there:
        raise InputError("torch sees no GPU; --device cpu trains on the CPU, for tests")
    count = min(args.processes or there, there, len(todo))
    devices = [f"cuda:{n}" if args.device == "cuda" else "cpu" for n in range(count)]
    outcomes: dict[str, str] = {}
    if todo:
        longest = max(run.tokens + run.model["block_size"] + 1 for run in todo)
        settings = (parts, longest, args.out, rows, deadline, args.checkpoint_every, args.keep, args.commit)
        outcomes = train_all(todo, devices, settings, deadline)
    left = [run for run in todo if outcomes.get(run.id) not in ("finished", "diverged")]
    for run in left:
        print(f"left: {run.name}: {outcomes.get(run.id, 'not begun')}", file=sys.stderr)
    print(f"{len(runs) - len(left)} of {len(runs)} runs have ended; rows in {rows}")
    failed = any(outcome.startswith("failed") for outcome in outcomes.values())
    return 1 if failed else 3 if left else 0


def unfinished(runs: list[Run], path: Path, out: Path, corpus: str, *, change: bool = True) -> list[Run]:
    """The runs that have not ended. Rows of theirs that come after their checkpoint are removed from the file.

    Raises:
        InputError: if rows or checkpoints were made with another corpus.
    """
    rows = read_rows(path)
    mine = {run.id for run in runs}
    ended = {row.run for row in rows if row.state}
    for row in rows:
        if row.run in mine and row.corpus != corpus:
            raise InputError(f"{path} has rows of corpus {row.corpus}, this one is {corpus}: use another file for them")
    steps = {}
    for run in runs:
        if run.id not in ended and (checkpoints := find_checkpoints(out / run.id)):
            training = Checkpoint(checkpoints[-1]).training
            steps[run.id] = training["step"]
            if training["corpus"] != {"id": corpus}:
                raise InputError(f"{checkpoints[-1]} is of corpus {training['corpus'].get('id')}, this one is {corpus}")
    if change:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = [r for r in rows if r.run not in mine or r.run in ended or r.step <= steps.get(r.run, 0)]
        write_rows(path, keep)
    return [run for run in runs if run.id not in ended]


def train_all(runs: list[Run], devices: list[str], settings: tuple, deadline: float | None) -> dict[str, str]:
    """Trains runs on devices, one process for each where there are several.

    Returns:
        By id: "finished", "diverged", "cut", or "failed: ..."; runs that were not begun are missing.
    """
    if len(devices) == 1:
        train, outcomes = _trainer(devices[0], settings), {}
        for run in _in_order(runs):
            if (deadline is None or time.time() < deadline) and _works(devices[0]):
                outcomes[run.id] = _attempt(train, run)
        return outcomes
    context = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes, being daemons, end with this one
    waiting, outcomes = list(runs), {}
    at_work: dict[multiprocessing.connection.Connection, Run | None] = {}
    for device in devices:
        ours, theirs = context.Pipe()
        arguments = (theirs, device, settings, torch.get_num_threads())  # as many: equal losses to the bit
        context.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        at_work[ours] = None
        _hand_out(ours, at_work, waiting, deadline)
    while at_work:
        for connection in multiprocessing.connection.wait(list(at_work)):
            run = at_work[connection]
            try:
                outcomes[run.id], works = connection.recv()
            except EOFError:
                outcomes[run.id], works = "failed: its process died", False
            if works:
                _hand_out(connection, at_work, waiting, deadline)
            else:  # the others go on
                del at_work[connection]
    return outcomes


def _hand_out(
    connection: multiprocessing.connection.Connection,
    at_work: dict[multiprocessing.connection.Connection, Run | None],
    waiting: list[Run],
    deadline: float | None,
) -> None:
    """Gives a process its next run: one of the model that it has compiled, else of one that no other has."""
    if not waiting or (deadline is not None and time.time() >= deadline):
        del at_work[connection]
        connection.send(None)
        return
    last = at_work[connection]
    others = [run.model for run in at_work.values() if run is not None]
    same = [run for run in waiting if last is not None and run.model == last.model]
    new = [run for run in waiting if run.model not in others]
    run = at_work[connection] = (same or new or waiting)[0]
    waiting.remove(run)
    connection.send(run)


def _serve(connection: multiprocessing.connection.Connection, device: str, settings: tuple, threads: int) -> None:
    """A process of one GPU: trains what it is sent until it is sent None, or the GPU works no more."""
    torch.set_num_threads(threads)
    train, works = None, True
    while works and (run := connection.recv()) is not None:
        try:
            train = train or _trainer(device, settings)
        except InputError as error:
            connection.send((f"failed: {error}", True))
            continue
        outcome, works = _attempt(train, run), _works(device)
        connection.send((outcome, works))


def _works(device: str) -> bool:
    """Whether a device does anything: after some errors it refuses everything until its process ends."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _trainer(device: str, settings: tuple) -> Trainer:
    parts, longest, out, rows, *others = settings
    if device != "cpu":
        torch.cuda.set_device(device)
    return Trainer(parts, longest, out, rows, torch.device(device), *others)


def _attempt(train: Callable[[Run], str], run: Run) -> str:
    """The outcome of a run, which must not end the others' when it fails."""
    try:
        return train(run)
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _in_order(runs: list[Run]) -> list[Run]:
    """Runs of one model in a row, models in the order of their first run."""
    models = [run.model for run in runs]
    return sorted(runs, key=lambda run: models.index(run.model))


if __name__ == "__main__":
    sys.exit(main())
