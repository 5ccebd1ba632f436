"""A training step of the C++ model beside the same step of the Python model, eager: time and peak memory.

Both run in processes of their own, in turns, with the same configuration, batch, threads and torch's fused AdamW, on
CUDA under bfloat16 autocast; of every figure the best turn counts, because what else the machine does only adds. "peak
MiB" is what tensors took on the device, "process MiB" the most that the whole process has had of the host's memory.

    python benchmarks/cpp_step.py --csv benchmarks/results/cpu_cpp_step.csv
    python benchmarks/cpp_step.py --device cuda --csv benchmarks/results/h100_cpp_step.csv

A machine without a compiler takes what another one built against the same version of torch:

    python benchmarks/cpp_step.py --build build/cpp_step --build-only
    python benchmarks/cpp_step.py --build build/cpp_step --device cuda ...
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import parser, write_rows

from muddformer import MUDDFormerConfig, build_model, utils

SIZES = {
    "4L x 64": {"n_layer": 4, "dim": 64, "n_head": 4, "vocab_size": 256, "block_size": 64},
    "12L x 256": {"n_layer": 12, "dim": 256, "n_head": 4, "vocab_size": 4096, "block_size": 128},
    "12L x 1024": {"n_layer": 12, "dim": 1024, "n_head": 16, "vocab_size": 50304, "block_size": 1024},
    "24L x 1024": {  # as train_step.py has it
        "n_layer": 24,
        "dim": 1024,
        "n_head": 16,
        "vocab_size": 50304,
        "block_size": 2048,
        "intermediate_size": 2816,
        "use_qk_norm": True,
        "ffn_reallocation": False,
    },
}
BATCHES = {"4L x 64": 4, "12L x 256": 4, "12L x 1024": 8, "24L x 1024": 8}
DEFAULT_SIZES = {"cpu": ["4L x 64", "12L x 256"], "cuda": ["12L x 1024", "24L x 1024"]}
MODELS = {"MUDD": {}, "plain": {"dense": False}, "plain16": {"dense": False, "residual_dtype": "autocast"}}


def compile_program(build: Path) -> None:
    """cpp_step/ against the installed package, with CMake of the Python environment or the one on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, source = shutil.which("cmake", path=path) or "cmake", Path(__file__).with_name("cpp_step")
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={utils.cmake_prefix_path}"]
    subprocess.run([cmake, "-S", source, "-B", build, *options], check=True)
    subprocess.run([cmake, "--build", build], check=True)


def python_step(
    library: str, config: str, device: str, dtype: str, batch: str, tokens: str, seconds: str, threads: str
) -> None:
    """What cpp_step/main.cpp does."""

    def median_ms(call) -> float:
        for _ in range(3):
            call()
        synchronize()
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while len(times) < 10 or time.perf_counter() < end:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize()
            times.append(1e3 * (time.perf_counter() - begin) / calls)
        return sorted(times)[len(times) // 2]

    def peak_resident_mib() -> float:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

    def one_pass() -> None:
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, targets)
        loss.backward()

    def step() -> None:
        one_pass()
        optimizer.step()

    kind = torch.device(device).type
    calls = 5 if kind == "cuda" else 1
    synchronize = torch.cuda.synchronize if kind == "cuda" else lambda: None
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    tensor_memory = ctypes.CDLL(library)
    tensor_memory.peak_tensor_mib.restype = ctypes.c_double
    tensor_memory.count_tensor_memory()
    model = build_model(MUDDFormerConfig.from_dict(json.loads(Path(config).read_text())), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (int(batch), int(tokens))).to(device)
    targets = ids.roll(-1, 1)
    figures = [median_ms(step), median_ms(one_pass)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if kind == "cuda" else tensor_memory.peak_tensor_mib()
    print(*figures, peak, peak_resident_mib())


def measure(commands: dict[str, list[str]], arguments: list[object], turns: int) -> dict[str, list[float]]:
    """The best of every figure, for each of the commands, which run in turns."""
    # A program that was carried here finds this machine's libraries.
    libraries = [Path(torch.__file__).parent / "lib", Path(utils.cmake_prefix_path).parents[1] / "lib"]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    figures: dict[str, list[list[float]]] = {language: [] for language in commands}
    for _ in range(turns):
        for language, command in commands.items():
            run = subprocess.run(
                [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
            )
            if run.returncode != 0:
                sys.exit(f"{language}: {run.stderr}")
            figures[language].append([float(figure) for figure in run.stdout.split()])
    return {language: [min(values) for values in zip(*rows, strict=True)] for language, rows in figures.items()}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--turns", type=int, default=3, help="turns of each of the two")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each of the two")
    p.add_argument("--sizes", nargs="+", choices=SIZES, help="sizes of the models; default: what suits the device")
    p.add_argument("--build", type=Path, help="folder of the compiled program; default: compiled in a temporary one")
    p.add_argument("--build-only", action="store_true", help="only compile the program, in the folder --build")
    args = p.parse_args()
    torch.set_num_threads(args.threads)  # what the rows say of the device
    device = torch.device(args.device)
    place, dtype = ("cuda:0", "bfloat16") if device.type == "cuda" else ("cpu", "float32")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build = args.build or Path(folder)
        program, library = build.resolve() / "cpp_step", build.resolve() / "libtensor_memory.so"
        if args.build_only or not program.exists():
            compile_program(build)
        if args.build_only:
            return
        commands = {"C++": [str(program)], "Python": [sys.executable, __file__, "--step", str(library)]}
        for name in args.sizes or DEFAULT_SIZES[device.type]:
            size, config = SIZES[name], Path(folder) / "config.json"
            for model, fields in MODELS.items():
                config.write_text(json.dumps(MUDDFormerConfig(**size, **fields).to_dict()))
                arguments = [config, place, dtype, BATCHES[name], size["block_size"], args.seconds, args.threads]
                for language, figures in measure(commands, arguments, args.turns).items():
                    step, one_pass, peak, process = figures
                    row = {"size": name, "batch": BATCHES[name], "tokens": size["block_size"], "dtype": dtype,
                           "model": model, "language": language, "step ms": round(step, 3),
                           "forward+backward ms": round(one_pass, 3), "peak MiB": round(peak, 2),
                           "process MiB": round(process, 1)}  # fmt: skip
                    print(row, flush=True)
                    rows.append(row)
    write_rows(rows, args.csv, device)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        python_step(*sys.argv[2:])
    else:
        main()
