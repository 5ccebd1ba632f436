"""Models whose gradients of older hidden states are deferred: they are those of single layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import make
from helpers.op_samples import relative_error, tolerance

CASES: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("pre-post", {}),
    ("default", {"post_norm": "all"}),
    ("stride-2x2", {}),
    ("default", {"ways": "qv"}),
    ("static", {}),
    ("one-way", {}),
    ("pythia", {}),
]


def model_gradients(
    variant: str, interval: int | None, device: torch.device, dtype: torch.dtype, **changes: Any
) -> list[Tensor]:
    torch.manual_seed(0)
    size = {"n_layer": 9, "dim": 64, "vocab_size": 64, "block_size": 16, "intermediate_size": 256}
    model = make(variant, **size, ffn_reallocation=True, flush_interval=interval, **changes).to(device, dtype)
    with torch.no_grad():
        for parameter in model.connection_parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter) / 20)
    ids = torch.randint(64, (2, 16)).to(device)
    model(ids, targets=ids).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("variant", "changes"), CASES, ids=str)
@pytest.mark.parametrize("interval", [2, 4, 16])
def test_groups_give_the_gradients_of_single_layers(
    variant: str, changes: dict, interval: int, device: torch.device
) -> None:
    expected = model_gradients(variant, 1, device, torch.float64, **changes)
    actual = model_gradients(variant, interval, device, torch.float64, **changes)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(actual, expected, strict=True))


@pytest.mark.cuda
def test_models_defer_by_default_on_cuda() -> None:
    """bfloat16 models on CUDA flush in groups, with gradients no further from float64 than without."""
    device = torch.device("cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        actual = model_gradients("default", None, device, torch.bfloat16)
    assert any("flush_kernel" in event.key for event in profile.key_averages())
    wide, single = (model_gradients("default", 1, device, dtype) for dtype in (torch.float64, torch.bfloat16))
    for a, b, w in zip(actual, single, wide, strict=True):
        assert relative_error(a, w) <= max(1.5 * relative_error(b, w), 4 * tolerance(torch.bfloat16))
