"""What the host does for a call: nothing twice, and no view of a tensor that is only read."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from muddformer import ops

SOURCES = 7


def row() -> Tensor:
    return torch.randn(2, 8)


def generator() -> list[Tensor]:
    return [row(), torch.randn(6, 8), torch.randn(4, 6), torch.randn(2, 2)]


def head() -> Tensor:
    return torch.randn(1, 2, 1, 4)


OPERATORS = {
    "connection_weights": (ops.connection_weights, generator),
    "connection_weights_chained": (ops.connection_weights_chained, generator),
    "depth_aggregate": (lambda x, w: ops.depth_aggregate([x], w), lambda: [row(), torch.randn(2, 1, 1)]),
    "depth_aggregate_chained": (
        lambda x, w: ops.depth_aggregate_chained([x], w),
        lambda: [row(), torch.randn(2, 1, 1)],
    ),
    "depth_aggregate_norm_chained": (
        lambda x, w, n: ops.depth_aggregate_norm_chained([x], w, ops.StreamNorms([n], None, "rms", 1e-6)),
        lambda: [row(), torch.randn(2, 1, 1), torch.ones(8)],
    ),
    "linear": (ops.linear, lambda: [row(), torch.randn(4, 8)]),
    "swiglu": (ops.swiglu, lambda: [row(), row()]),
    "add_norm": (ops.add_norm, lambda: [row(), row(), torch.ones(8)]),
    "qk_norm_rotary": (ops.qk_norm_rotary, lambda: [head(), head(), torch.randn(2, 2), torch.randn(2, 2)]),
}


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    make = {"device": device, "dtype": dtype}
    hiddens = [torch.randn(2, 3, 16, **make).requires_grad_() for _ in range(SOURCES)]
    return hiddens, torch.randn(2, 3, 4, SOURCES, **make).requires_grad_()


def calls_of(profiled: profile) -> list[str]:
    """Names of the operators that were called, but for allocations and autograd's views of what is handed on."""
    names = [event.name for event in profiled.events() if event.name.startswith(("aten::", "muddformer::"))]
    return sorted(n for n in names if n not in ("aten::empty", "aten::empty_strided", "aten::view_as", "aten::view"))


def test_aggregation_calls_no_other_operator(device: torch.device) -> None:
    hiddens, weights = inputs(device, torch.bfloat16)
    grads = [torch.randn_like(hiddens[0]) for _ in range(4 + SOURCES)]
    ops.depth_aggregate_chained(hiddens, weights)  # what happens once
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        streams, handed_on = ops.depth_aggregate_chained(hiddens, weights)
    assert calls_of(profiled) == ["muddformer::depth_aggregate", "muddformer::depth_aggregate_chained"]
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        torch.autograd.grad([*streams, *handed_on], [*hiddens, weights], grads)
    assert calls_of(profiled) == ["muddformer::depth_aggregate_backward"]


@pytest.mark.parametrize("deferred", [False, True], ids=["chained", "deferred"])
def test_handed_on_tensors_share_memory_and_changes(device: torch.device, deferred: bool) -> None:
    """A hidden state that was handed on is a view of the one that came: nothing can be written into it."""
    hiddens, weights = inputs(device, torch.float32)
    hiddens = [x * 1 for x in hiddens]
    given, deferral = hiddens, None
    if deferred:
        older, (deferral,) = ops.defer_gradients(hiddens[:-1], [(4, SOURCES)])
        given = [*older, hiddens[-1]]
    streams, handed_on = ops.depth_aggregate_chained(given, weights, deferral)
    for x, y in zip(hiddens, handed_on, strict=True):
        assert y.data_ptr() == x.data_ptr() and y.requires_grad and y.grad_fn is not x.grad_fn
        with pytest.raises(RuntimeError, match="is a view"):
            y.mul_(2)
    sum(y.sum() for y in streams).backward()


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_tangents_are_refused(name: str) -> None:
    """Forward mode is an error by name, with gradients or without, and never a result without a tangent."""
    function, arguments = OPERATORS[name]
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            first, *others = arguments()
            first.requires_grad_(requires_grad)
            dual = forward_ad.make_dual(first, torch.ones_like(first))
            with pytest.raises((RuntimeError, NotImplementedError)):
                function(dual, *others)


@pytest.mark.parametrize("layout", ["wide rows", "transposed", "expanded tokens", "one row", "every second"])
def test_rows_of_any_layout(device: torch.device, layout: str) -> None:
    """Rows are read where they are if they can be, and copied if not: with the same result."""
    made = {
        "wide rows": lambda: torch.randn(2, 3, 40, device=device)[..., 8:24],
        "transposed": lambda: torch.randn(3, 2, 16, device=device).transpose(0, 1),
        "expanded tokens": lambda: torch.randn(16, device=device).expand(2, 3, 16),
        "one row": lambda: torch.randn(1, 1, 3, 16, device=device)[:, :, 1],
        "every second": lambda: torch.randn(2, 3, 32, device=device)[..., ::2],
    }
    hiddens = [made[layout]() for _ in range(3)]
    weights = torch.randn(*hiddens[0].shape[:-1], 2, 3, device=device)
    grads = [made[layout]() for _ in range(2)]

    def both(hiddens: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in [*hiddens, weights]]
        streams, _ = ops.depth_aggregate_chained(leaves[:-1], leaves[-1])
        return [*streams, *torch.autograd.grad(streams, leaves, grads)]

    copies = [x.contiguous() for x in hiddens], [g.contiguous() for g in grads]
    for result, expected in zip(both(hiddens, grads), both(*copies), strict=True):
        assert torch.equal(result, expected)
