"""Memory of results on the CPU: kept for the next ones, at most so much of it, and given back when idle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Results of 64 MiB, the resident memory (MiB) beyond that of the start when they are freed, and after seconds.
PROGRAM = """
import os, resource, sys, time
import torch
from muddformer import ops

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def run():
    return ops.depth_aggregate(hiddens, weights)

torch.set_num_threads(1)
hiddens, weights = [torch.ones({tokens}, 4096)] * 2, torch.ones({tokens}, {ways}, 2)
small = ops.depth_aggregate([x[:1] for x in hiddens], weights[:1])
start = resident()
{body}
"""


def outcome(body: str, *, ways: int = 4, **environment: str) -> list[float]:
    """The numbers that a program of its own prints."""
    env = {**os.environ, **environment}
    if "MUDDFORMER_CPU_CACHE_MIB" not in environment:
        env.pop("MUDDFORMER_CPU_CACHE_MIB", None)
    program = PROGRAM.format(body=body, tokens=4096 // ways, ways=ways)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


@pytest.mark.parametrize("ways", [4, 64])
def test_results_are_kept_and_given_back(ways: int) -> None:
    body = """
torch.empty(5 << 20)  # whose end makes malloc keep what is smaller in its heap
place = {y.data_ptr() for y in run()}
print(resident() - start)
again = run()
print(len(place & {y.data_ptr() for y in again}))
del again
time.sleep(8)  # no operator is called any more
print(resident() - start)
place = run()  # and begins anew
del place
print(resident() - start)
"""
    kept, same, idle, anew = outcome(body, ways=ways)
    assert same == ways and min(kept, anew) > 56 and idle < 8


def test_a_child_gives_back_its_own() -> None:
    body = """
run()
child = os.fork()
if child == 0:
    run()
    kept = resident()
    time.sleep(8)
    print(kept - resident(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    [given_back] = outcome(body)
    assert given_back > 56


@pytest.mark.parametrize(("mebibytes", "kept"), [("0", 0), ("32", 32), ("64", 64)])
def test_the_most_that_is_kept(mebibytes: str, kept: int) -> None:
    [resident] = outcome("run()\nprint(resident() - start)", MUDDFORMER_CPU_CACHE_MIB=mebibytes)
    assert kept - 4 <= resident <= kept + 8


def test_bad_sizes_are_refused_at_the_first_use() -> None:
    program = """
import os, sys
import torch
from muddformer import ops

for value in ["-1", "1.5", "lots", "12 ", "0x10", str(2**20 + 1), "9" * 30]:
    os.environ["MUDDFORMER_CPU_CACHE_MIB"] = value
    try:
        ops.depth_aggregate([torch.ones(2, 8)], torch.ones(2, 1, 1))
        sys.exit(f"{value!r} was taken")
    except ValueError as error:
        wanted = f"MUDDFORMER_CPU_CACHE_MIB: expected a whole number of MiB from 0 to 1048576, got '{value}'"
        assert wanted in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
