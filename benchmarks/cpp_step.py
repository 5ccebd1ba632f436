"""A training step of the C++ model beside the same step of the Python model, eager: time and peak memory.

Both run in processes of their own, in turns, with the same configuration, batch, threads and AdamW; of every figure the
best turn counts, because what else the machine does only adds. Peak memory is what tensors took on CUDA, and on a CPU
what the process has grown by since its start.

    python benchmarks/cpp_step.py --csv benchmarks/results/cpu_cpp_step.csv
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import parser, write_rows
from cpp_program import build_program  # tests/cpp_program.py

from muddformer import MUDDFormerConfig, build_model

SIZES = {
    "4L x 64": {"n_layer": 4, "dim": 64, "n_head": 4, "vocab_size": 256, "block_size": 64},
    "12L x 256": {"n_layer": 12, "dim": 256, "n_head": 4, "vocab_size": 4096, "block_size": 128},
}
BATCHES = {"4L x 64": 4, "12L x 256": 4}


def python_step(config: str, device: str, batch: str, tokens: str, seconds: str, threads: str) -> None:
    """What cpp_step.cpp does."""

    def median_ms(call) -> float:
        for _ in range(3):
            call()
        synchronize()
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while len(times) < 10 or time.perf_counter() < end:
            begin = time.perf_counter()
            call()
            synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return sorted(times)[len(times) // 2]

    def peak_resident_mib() -> float:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

    def one_pass() -> None:
        optimizer.zero_grad()
        model(ids, targets).backward()

    def step() -> None:
        one_pass()
        optimizer.step()

    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    before = peak_resident_mib()
    model = build_model(MUDDFormerConfig.from_dict(json.loads(Path(config).read_text())), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (int(batch), int(tokens))).to(device)
    targets = ids.roll(-1, 1)
    figures = [median_ms(step), median_ms(one_pass)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else peak_resident_mib() - before
    print(*figures, peak)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--turns", type=int, default=3, help="turns of each of the two")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each of the two")
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="sizes of the models")
    args = p.parse_args()
    torch.set_num_threads(args.threads)  # what the rows say of the device
    device = torch.device(args.device)
    place = "cuda:0" if device.type == "cuda" else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = build_program(Path(__file__).with_name("cpp_step.cpp"), Path(folder))
        commands = {"C++": [str(program)], "Python": [sys.executable, __file__, "--step"]}
        for name, size in ((name, SIZES[name]) for name in args.sizes):
            config = Path(folder) / "config.json"
            for model, dense in (("MUDD", True), ("plain", False)):
                config.write_text(json.dumps(MUDDFormerConfig(**size, dense=dense).to_dict()))
                arguments = [str(config), place, BATCHES[name], size["block_size"], args.seconds]
                arguments = [*map(str, arguments), str(args.threads)]
                turns: dict[str, list[list[float]]] = {language: [] for language in commands}
                for _ in range(args.turns):
                    for language, command in commands.items():
                        run = subprocess.run([*command, *arguments], capture_output=True, text=True)
                        if run.returncode != 0:
                            sys.exit(f"{language}: {run.stderr}")
                        turns[language].append([float(figure) for figure in run.stdout.split()])
                for language, figures in turns.items():
                    step, one_pass, peak = (round(min(values), 3) for values in zip(*figures, strict=True))
                    row = {"size": name, "batch": BATCHES[name], "tokens": size["block_size"], "model": model,
                           "language": language, "step ms": step, "forward+backward ms": one_pass,
                           "peak MiB": round(peak, 1)}  # fmt: skip
                    print(row, flush=True)
                    rows.append(row)
    write_rows(rows, args.csv, device)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        python_step(*sys.argv[2:])
    else:
        main()
