"""Fixtures and options shared by all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """The environment of all processes of a run, which are started after this."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    # What torch.compile makes is kept for this run alone: an older run may have met older operators.
    compiled = tempfile.TemporaryDirectory(prefix="muddformer-inductor-", ignore_cleanup_errors=True)
    config.add_cleanup(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
    # Threads that wait sleep: spinning would take the processors from the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped, and say so, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the ops have a backend for."""
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as small as those of the training tests gain nothing from more, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
