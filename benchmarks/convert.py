"""Converting a checkpoint beside copying its file: time and peak memory.

A pytorch_model.bin of MUDDFormer-2.8B's shape, random bfloat16 (one block of it again and again), is made in a scratch
folder and converted to ours. The floor is shutil.copyfile of the same file to the same disk. Both end when what they
wrote is on the disk; they take turns, and medians count, with the file in memory and without. Each runs in a process of
its own, whose clock starts when Python and torch are loaded: a virtual machine may give memory back to its host while
nothing happens, and getting it again takes as long as copying. Peak memory is the largest resident set, pages of the
mapped file included.

    python benchmarks/convert.py --folder /scratch --csv benchmarks/results/cpu_convert.csv
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from common import write_rows
from torch._subclasses.fake_tensor import FakeTensorMode

from muddformer import MUDDFormerConfig, build_model
from muddformer._files import remove
from muddformer.models import release
from muddformer.models.convert import convert
from muddformer.training.metrics import peak_memory_mib


def make_checkpoint(folder: Path, preset: str) -> None:
    """A directory as the release has it, without ever holding the weights in memory."""
    config = MUDDFormerConfig.preset(preset, use_qk_norm=True)
    (folder / "config.json").write_text(json.dumps(release.keys_of(config.to_dict())))
    path = folder / "pytorch_model.bin"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        model = build_model(config, device="cpu", dtype=torch.bfloat16)
        torch.save(dict(model.state_dict()), path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        state = torch.load(path, mmap=True, weights_only=True)
    block = torch.randn(2**24).bfloat16() / 50
    for value in state.values():
        for part in value.view(-1).split(len(block)):
            part.copy_(block[: len(part)])


def forget(path: Path) -> None:
    """Leaves no page of a file in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def recall(path: Path) -> None:
    """Has a file in memory, as far as there is room."""
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass


def copy(source: Path, target: Path) -> None:
    """Copies the checkpoint's file onto the disk."""
    shutil.copyfile(source / "pytorch_model.bin", target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def convert_whole(source: Path, target: Path) -> None:
    convert(source, target, max_shard_bytes=10**12)


def time_it(do: Callable[[Path, Path], None], source: Path, target: Path, pipe: Connection) -> None:
    """Sends the seconds that something takes, and the peak memory before and after it, in MiB."""
    before, begin = peak_memory_mib(torch.device("cpu")), time.perf_counter()
    do(source, target)
    pipe.send((time.perf_counter() - begin, before, peak_memory_mib(torch.device("cpu"))))


def measure(do: Callable[[Path, Path], None], source: Path, target: Path) -> tuple[float, float, float]:
    """What time_it() sends of a process of its own. Nothing is left of what it wrote."""
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=time_it, args=(do, source, target, there))
    process.start()
    there.close()  # so that recv() does not wait for a process that has failed
    result = here.recv()
    process.join()
    remove(target)
    return result


def measure_row(preset: str, scratch: Path, cold: bool, turns: int) -> dict[str, object]:
    """Medians of a copy and a conversion in turns, of a file that is in memory or is not."""
    source = scratch / "in" / "pytorch_model.bin"
    prepare = forget if cold else recall
    copies, conversions, peaks = [], [], []
    for _ in range(turns):
        prepare(source)
        copies.append(measure(copy, scratch / "in", scratch / "copy")[0])
        prepare(source)
        seconds, before, peak = measure(convert_whole, scratch / "in", scratch / "out")
        conversions.append(seconds)
        peaks.append(peak)
        print(
            f"copy {copies[-1]:.2f} s, convert {seconds:.2f} s, {before:.0f} MiB before, {peak:.0f} at most", flush=True
        )
    size, copied, converted = source.stat().st_size, statistics.median(copies), statistics.median(conversions)
    return {
        "preset": preset,
        "source": source.name,
        "in_memory": "no" if cold else "yes",
        "gb": round(size / 1e9, 3),
        "copy_s": round(copied, 2),
        "convert_s": round(converted, 2),
        "ratio": round(converted / copied, 3),
        "target": 1.2,
        "peak_mib": round(max(peaks)),
        "peak_of_shard": round(max(peaks) * 2**20 / size, 3),
        "target_peak": 1.2,
        "turns": turns,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, help="where the scratch folder is made: the disk that is measured")
    p.add_argument("--preset", default="MUDDFormer-2.8B", help="shape of the checkpoint")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--csv", type=Path, help="file to append the row to")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        scratch = Path(name)
        (scratch / "in").mkdir()
        make_checkpoint(scratch / "in", args.preset)
        for cold in (True, False):
            row = measure_row(args.preset, scratch, cold, args.turns)
            write_rows([row], args.csv, torch.device("cpu"))


if __name__ == "__main__":
    main()
