"""What connections of trained runs do: ``python benchmarks/quality/inspection.py RUNS --corpus PARTS --output FILE``.

Reads the checkpoints that ``run.py --keep`` left in the folder RUNS and writes what ``muddformer inspect`` measures, on
held-out text, to one JSON file, from which report.py makes its last section. Needs no tokenizer and draws nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import float8_history  # noqa: F401  (registers its model type)
import torch
from parts import Parts
from sets import Run

from muddformer._files import write_atomically
from muddformer.errors import InputError
from muddformer.inference.inspection import inspect_model
from muddformer.inference.loading import find_checkpoints, find_device, load_model
from muddformer.training.data import held_out_batches
from muddformer.training.state import Checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", type=Path, help="folder of checkpoints that run.py --keep wrote")
    p.add_argument("--corpus", type=Path, required=True, help="folder of parts that the runs were trained on")
    p.add_argument("--output", type=Path, required=True, help="JSON file to write")
    p.add_argument("--tokens", type=int, default=65536, help="of held-out text to look at (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    args = p.parse_args(arguments)
    try:
        parts, device = Parts(args.corpus), find_device(args.device)
        folders = [folder for folder in sorted(args.runs.iterdir()) if folder.is_dir() and find_checkpoints(folder)]
        if not folders:
            raise InputError(f"{str(args.runs)!r} holds no checkpoints: run.py --keep leaves some")
        found = [inspect_run(folder, parts, args.tokens, device) for folder in folders]
    except (InputError, OSError) as error:
        print(f"inspection.py: {error}", file=sys.stderr)
        return 2
    text = json.dumps(_short(found), separators=(",", ":")).replace('{"form"', '\n{"form"') + "\n"
    write_atomically(args.output, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def inspect_run(folder: Path, parts: Parts, tokens: int, device: torch.device) -> dict[str, Any]:
    """What the connections of a run's last checkpoint do, and the norms of the hidden states in all its checkpoints."""
    checkpoints = find_checkpoints(folder)
    norms, held_out = {}, parts.held_out()
    for checkpoint in checkpoints:
        training = Checkpoint(checkpoint).training
        if training["corpus"] != {"id": parts.id}:
            raise InputError(f"{checkpoint} is of corpus {training['corpus'].get('id')}, this one is {parts.id}")
        run, model = Run(**training["settings"]), load_model(checkpoint).to(device)
        length = min(run.model["block_size"], tokens)
        batches = [inputs for inputs, _ in held_out_batches(held_out, length, 1, max(1, tokens // length))]
        seen = training["sequences"] * run.model["block_size"]
        inspection = inspect_model(model, batches if checkpoint == checkpoints[-1] else batches[:1])
        norms[seen] = inspection.history_rms.tolist()
    head = {"form": run.form, "size": run.size, "run": run.id, "seed": run.seed, "trained": seen, "corpus": parts.id}
    return {**head, "tokens": sum(ids.numel() for ids in batches), **inspection.to_dict(), "norms": norms}


def _short(value: Any) -> Any:
    """The same with numbers of five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
