"""benchmarks/profile_step.py: whose time a moment is where kernels overlap, and what a trace holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from helpers.programs import BENCHMARKS, programs


@pytest.fixture
def profile_step() -> Iterator[ModuleType]:
    with programs(BENCHMARKS, "profile_step") as modules:
        yield modules.profile_step


def own_us(profile_step: ModuleType, *kernels: tuple[str, float, float]) -> dict[str, float]:
    """Microseconds that each kernel is given."""
    found = profile_step.own_times([profile_step.Kernel(*kernel) for kernel in kernels])
    return {name: pytest.approx(1e3 * profile_step.STEPS * ms) for name, (ms, _) in found.kernels.items()}


def test_a_kernel_that_waits_for_the_one_before_counts_from_its_end(profile_step: ModuleType) -> None:
    assert own_us(profile_step, ("gemm", 0, 10), ("swiglu", 8, 15), ("adam", 9, 12)) == {
        "gemm": 10,
        "swiglu": 5,
        "adam": 0,
    }


def test_communication_counts_where_nothing_else_runs(profile_step: ModuleType) -> None:
    kernels = ("nccl gather", 0, 30), ("gemm", 5, 10), ("swiglu", 8, 12), ("adam", 20, 22), ("nccl reduce", 25, 40)
    assert own_us(profile_step, *kernels[::-1]) == {
        "nccl gather": 30 - 7 - 2,
        "gemm": 5,
        "swiglu": 2,
        "adam": 2,
        "nccl reduce": 10,
    }


def test_rows_add_up_to_the_step(profile_step: ModuleType) -> None:
    us = 1e3 * profile_step.STEPS
    found = profile_step.own_times([profile_step.Kernel("gemm", 5, 15), profile_step.Kernel("nccl", 25, 30)])
    rows = {kind: us * ms for kind, ms in profile_step.by_kind(20 / us, found).items() if ms}
    assert rows == pytest.approx(
        {"communication": 5, "matrix products": 10, "between kernels": 10, "less the profiler": -5}
    )


def test_a_trace_has_kernels_and_copies(profile_step: ModuleType, tmp_path: Path) -> None:
    events = [
        {"name": "gemm", "cat": "kernel", "ts": 1.5, "dur": 2},
        {"name": "Memcpy DtoD", "cat": "gpu_memcpy", "ts": 4, "dur": 1},
        {"name": "aten::mm", "cat": "cpu_op", "ts": 0, "dur": 9},
        {"name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert profile_step.read_trace(path) == [("gemm", 1.5, 3.5), ("Memcpy DtoD", 4.0, 5.0)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        (
            "void at::native::split_with_sizes_copy_out_contiguous_no_cast",
            "gathering and cutting of shards",
        ),
        ("void muddformer::kernels::forward_ring<4, true>", "aggregation forward"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("Memset (Device)", "copies and fills"),
        ("something", "other kernels"),
    ],
)
def test_kinds_of_kernels(profile_step: ModuleType, name: str, kind: str) -> None:
    assert profile_step.kind_of(name) == kind
