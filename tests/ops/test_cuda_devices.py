"""All operators on a stream of their own, and on a device that is not the current one."""

from __future__ import annotations

import pytest
import torch

from helpers.every_operator import everything, inputs
from helpers.op_samples import DTYPES

pytestmark = pytest.mark.cuda
WIDTHS = [30, 256]  # the scalar and the vector kernels


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_current_stream(width: int, dtype: torch.dtype) -> None:
    """On another stream they read what that stream has written, however late."""
    tensors = inputs((3, 5), width, dtype, "cuda:0")
    expected = everything(tensors)
    late = [torch.full_like(t, torch.nan) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
        results = everything(late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_device(width: int, dtype: torch.dtype) -> None:
    tensors = inputs((3, 5), width, dtype, "cuda:0")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two equal CUDA devices: sums are taken in an order of the device")
    expected = everything(tensors)
    results = everything([t.to("cuda:1") for t in tensors])
    assert torch.cuda.current_device() == 0
    for result, y in zip(results, expected, strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), y.cpu())
