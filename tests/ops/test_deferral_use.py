"""A deferral is for one call: the second is an error, wherever it is, as is one of another group's tickets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muddformer import ops
from muddformer.nn import MUDDStack

AGAIN = "deferral: expected one that no layer was called with before"
Layer = Callable[[list[Tensor], Tensor, ops.Deferral], list[Tensor]]


def plain(hiddens: list[Tensor], weights: Tensor, deferral: ops.Deferral) -> list[Tensor]:
    return ops.depth_aggregate_chained(hiddens, weights, deferral)[0]


def normed(hiddens: list[Tensor], weights: Tensor, deferral: ops.Deferral) -> list[Tensor]:
    scale = torch.ones(8, device=weights.device, dtype=weights.dtype)
    return ops.depth_aggregate_norm_chained(hiddens, weights, [scale, None], deferral=deferral)[0]


def group(device: torch.device, layers: int = 1) -> tuple[list[Tensor], Tensor, list[ops.Deferral]]:
    hiddens = [torch.randn(2, 3, 8, device=device, requires_grad=True) for _ in range(3)]
    older, deferrals = ops.defer_gradients(hiddens, [(2, 3)] * layers)
    return older, torch.randn(2, 3, 2, 3, device=device), deferrals


@pytest.mark.parametrize("layer", [plain, normed])
def test_second_use(layer: Layer, device: torch.device) -> None:
    hiddens, w, (deferral,) = group(device)
    layer(hiddens, w, deferral)
    with pytest.raises(RuntimeError, match=AGAIN):
        layer(hiddens, w * 2, deferral)
    copy = ops.Deferral(deferral.tickets, deferral.count)
    with pytest.raises(RuntimeError, match=f"{AGAIN}, got that of layer 0 of its group a second time"):
        layer(hiddens, w, copy)


@pytest.mark.parametrize("layer", [plain, normed])
def test_a_call_that_fails_is_no_use(layer: Layer, device: torch.device) -> None:
    hiddens, w, (deferral,) = group(device)
    with pytest.raises(ValueError, match="weights"):
        layer(hiddens, w[..., :2], deferral)
    layer(hiddens, w, deferral)


def test_second_use_after_a_backward(device: torch.device) -> None:
    hiddens, w, (first, second) = group(device, layers=2)
    plain(hiddens, w, second)[0].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=AGAIN):
        plain(hiddens, w, second)
    plain(hiddens, w, first)


def test_second_use_by_the_operator_itself(device: torch.device) -> None:
    hiddens, w, (deferral,) = group(device)
    deferred = torch.ops.muddformer.depth_aggregate_chained.deferred
    deferred(hiddens, w, deferral.tickets, deferral.count)
    with pytest.raises(RuntimeError, match=AGAIN):
        deferred(hiddens, w, deferral.tickets, deferral.count)


def test_without_gradients_nothing_is_used(device: torch.device) -> None:
    hiddens, w, (deferral,) = group(device)
    with torch.no_grad():
        plain(hiddens, w, deferral)
        plain(hiddens, w, deferral)
    plain(hiddens, w, deferral)


@pytest.mark.parametrize("change", ["another layer", "another group", "an order", "a count"])
def test_tickets_of_something_else(change: str, device: torch.device) -> None:
    hiddens, w, (first, second) = group(device, layers=2)
    w = w[..., :1, :].expand(2, 3, 2, 3)
    tickets, count = list(first.tickets), 3
    if change == "another layer":
        tickets[0] = second.tickets[0]
    elif change == "another group":
        tickets[1] = group(device)[2][0].tickets[1]
    elif change == "an order":
        tickets[:2] = tickets[1::-1]
    else:
        count = 2
    with pytest.raises(ValueError, match="deferred: expected 3 of the group" if count == 2 else r"tickets(\[|:)"):
        plain(hiddens, w, ops.Deferral(tickets, count))


@pytest.mark.parametrize("layer", [plain, normed])
def test_tickets_without_gradients(layer: Layer, device: torch.device) -> None:
    """They carry nothing back: of hidden states that require gradients these would be lost."""
    hiddens = [torch.randn(2, 3, 8, device=device) for _ in range(3)]
    w = torch.randn(2, 3, 2, 3, device=device, requires_grad=True)
    older, (deferral,) = ops.defer_gradients(hiddens, [(2, 3)])
    sum(layer(older, w, deferral)).sum().backward()
    assert w.grad is not None
    hiddens[1].requires_grad_()
    (deferral,) = ops.defer_gradients([h.detach() for h in hiddens], [(2, 3)])[1]
    with pytest.raises(ValueError, match=r"tickets: expected those of a group .* as hiddens\[1\] does, got tickets w"):
        layer(hiddens, w, deferral)
    older, (deferral,) = ops.defer_gradients([hiddens[0], hiddens[1].detach(), hiddens[2].requires_grad_()], [(2, 3)])
    with pytest.raises(ValueError, match=r"as hiddens\[1\] does, got tickets w"):
        layer([older[0], hiddens[1], older[2]], w, deferral)
    sum(layer(older, w, deferral)).sum().backward()
    assert hiddens[2].grad is not None and hiddens[1].grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_computed_again(reentrant: bool, device: torch.device) -> None:
    def gradients(wrapped: bool) -> list[Tensor]:
        torch.manual_seed(0)
        hiddens, w, (deferral,) = group(device)
        w.requires_grad_()

        def layer(w: Tensor, *hiddens: Tensor) -> Tensor:
            return sum(plain(list(hiddens), w, deferral)).tanh()

        y = checkpoint(layer, w, *hiddens, use_reentrant=reentrant) if wrapped else layer(w, *hiddens)
        y.sum().backward()
        return [w.grad]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.compile
@pytest.mark.parametrize("fullgraph", [False, True])
def test_second_use_in_one_compiled_graph(fullgraph: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    hiddens, w, _ = group(device)

    @torch.compile(backend="aot_eager", fullgraph=fullgraph)
    def twice(hiddens: list[Tensor], w: Tensor) -> Tensor:
        older, (deferral,) = ops.defer_gradients(hiddens, [(2, 3)])
        return sum(plain(older, w, deferral)) + sum(plain(older, w * 2, deferral))

    with pytest.raises(Exception, match="second time"):
        twice(hiddens, w)


@pytest.mark.compile
@pytest.mark.parametrize("first", ["eager", "compiled"])
@pytest.mark.parametrize("second", ["eager", "compiled"])
def test_second_use_in_another_graph(first: str, second: str, device: torch.device) -> None:
    torch._dynamo.reset()
    hiddens, w, (deferral,) = group(device)
    layers = {"eager": plain, "compiled": torch.compile(plain, backend="aot_eager")}
    layers[first](hiddens, w, deferral)
    with pytest.raises(RuntimeError, match=AGAIN):
        layers[second](hiddens, w * 2, deferral)


@pytest.mark.compile
def test_a_compiled_block_has_its_own_each_time(device: torch.device) -> None:
    """Blocks that are compiled one by one are given deferrals of new groups, and compile once for all of them."""
    torch._dynamo.reset()

    def loss(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        blocks = [torch.nn.Linear(8, 8) for _ in range(5)]
        stack = MUDDStack(blocks, 8, multiway=False, flush_interval=2).to(device)
        if compiled:
            for da in stack.dynamic_dense:
                da.compile(backend="aot_eager")
        x = torch.randn(2, 3, 8, device=device, requires_grad=True)
        for _ in range(2):
            stack(x).square().sum().backward()
        return [x.grad]

    torch.testing.assert_close(loss(True), loss(False))
