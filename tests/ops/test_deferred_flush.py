"""Deferred gradients: deferred_flush and defer_gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from helpers.op_samples import DTYPES, relative_error, tolerance
from muddformer import ops, reference

# tokens x D, number of older hidden states, ways of each layer
FLUSHES = [
    ((3,), 16, 2, (4, 4, 4, 1)),
    ((2, 3), 7, 3, (1, 2)),
    ((2, 2), 40, 1, (4, 4)),
    ((5,), 264, 16, (4, 4, 4, 4)),
    ((4,), 1032, 17, (3, 4)),
    ((2, 9), 256, 33, (4, 4, 4, 4, 4)),
    ((3,), 24, 70, (5, 12)),
    ((2, 0), 16, 2, (4, 4)),
]
FLUSH_IDS = [f"tokens{leading}-D{width}-old{old}-ways{ways}" for leading, width, old, ways in FLUSHES]


def flush_arguments(
    leading: tuple[int, ...], width: int, old: int, ways: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor]]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64).to(dtype)

    grads = [None if j % 5 == 1 else make(*leading, width) for j in range(old)]
    sums = [None if k % 7 == 3 else make(*leading, width) for k in range(sum(ways))]
    weights = [make(*leading, c, old + 1 + i) for i, c in enumerate(ways)]
    weights[-1] = weights[-1][..., :1, :].expand(weights[-1].shape)
    if len(leading) == 2:
        sums[0] = make(*leading[::-1], width).transpose(0, 1)
        grads[0] = make(*leading[::-1], width).transpose(0, 1)
    return grads, sums, weights


@pytest.mark.parametrize("sizes", FLUSHES, ids=FLUSH_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flush(sizes: Any, device: torch.device, dtype: torch.dtype) -> None:
    grads, sums, weights = flush_arguments(*sizes, device, dtype)
    results = torch.ops.muddformer.deferred_flush(grads, sums, weights)
    wide = [[None if t is None else t.double() for t in tensors] for tensors in (grads, sums, weights)]
    for result, expected in zip(results, reference.deferred_flush(*wide), strict=True):
        assert result.dtype == dtype
        assert relative_error(result, expected) <= tolerance(dtype)
        assert result.is_contiguous()  # as the meta kernel says
    again = torch.ops.muddformer.deferred_flush(grads, sums, weights)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("sizes", FLUSHES, ids=FLUSH_IDS)
def test_opcheck(sizes: Any, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    grads, sums, weights = flush_arguments(*sizes, device, dtype)
    opcheck(torch.ops.muddformer.deferred_flush.default, (grads, sums, weights), test_utils=utils)
    leading, width, old, ways = sizes
    hiddens = [torch.randn(*leading, width, device=device) for _ in range(weights[0].shape[-1])]
    streams = [torch.randn_like(hiddens[0]) for _ in range(ways[0])]
    opcheck(
        torch.ops.muddformer.depth_aggregate_backward.default,
        (streams, [], hiddens, weights[0].float(), old),
        test_utils=utils,
    )


@pytest.mark.parametrize("norm,prepost", [("rms", False), ("layer", True)])
def test_opcheck_of_the_norm_backward(norm: str, prepost: bool, device: torch.device) -> None:
    hiddens = [torch.randn(2, 3, 16, device=device) for _ in range(4)]
    weights, scale = torch.randn(2, 3, 3, 4, device=device), torch.rand(16, device=device) + 0.5
    arguments = (hiddens, weights, [scale, None, None], [None] * 3, norm, 1e-5)
    arguments += (True, scale, scale) if prepost else (False, None, None)
    outputs, _, *saved = torch.ops.muddformer.depth_aggregate_norm_forward(*arguments)
    grads = [torch.randn(3, 2, 16, device=device).transpose(0, 1) for _ in range(3)]
    backward = torch.ops.muddformer.depth_aggregate_norm_backward.default
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for deferred in (1, 3, *([] if prepost else [4])):
        opcheck(backward, (grads, [], *arguments, outputs, *saved, deferred), test_utils=utils)
        left = backward(grads, [], *arguments, outputs, *saved, deferred)[-1]
        assert [x.numel() > 0 for x in left] == [True, False, prepost]
        assert all(x.is_contiguous() for x in left)


@pytest.mark.parametrize("width", [1024, 2056, 2560, 3072, 5120])
@pytest.mark.parametrize("ways,prepost", [(1, False), (3, False), (4, False), (4, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_deferred_hiddens(
    width: int, ways: int, prepost: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """A stage of the ring brings two deferred sources; rows are of one chunk, and of several."""
    hiddens = [torch.randn(5, width, device=device).to(dtype) for _ in range(9)]
    weights = torch.randn(5, ways, 9, device=device).to(dtype)
    scale = 1 + torch.randn(width, device=device) / 4
    options = (True, scale, scale) if prepost else (False, None, None)
    arguments = (hiddens, weights, [scale] * (ways - 1) + [None], [None] * ways, "rms", 1e-6, *options)
    outputs, _, *saved = torch.ops.muddformer.depth_aggregate_norm_forward(*arguments)
    grads = [torch.randn(5, width, device=device).to(dtype) for _ in range(ways)]
    named = {"add_newest": options[0], "pre_weight": options[1], "post_weight": options[2]}
    wide = [h.double() for h in hiddens], weights.double().requires_grad_(), [scale.double()] * (ways - 1) + [None]
    named = {name: value.double() if isinstance(value, Tensor) else value for name, value in named.items()}
    streams, _ = reference.depth_aggregate_norm(*wide, [None] * ways, norm="rms", eps=1e-6, **named)
    (expected,) = torch.autograd.grad(streams, wide[1], [g.double() for g in grads])
    backward = torch.ops.muddformer.depth_aggregate_norm_backward
    distances = [
        distance(backward(grads, [], *arguments, outputs, *saved, deferred)[1], expected)
        for deferred in (0, 1, 2, 3, 5, 8)
    ]
    assert max(distances) <= 2 * tolerance(dtype)
    assert max(distances) <= 1.1 * distances[0]


class Chain(torch.nn.Module):
    """Five layers of aggregation and norms of their streams; the last three are a group, where there is one."""

    def __init__(self, width: int, norms: str, prepost: bool, grouped: bool | None) -> None:
        super().__init__()
        self.norms, self.prepost, self.grouped = norms, prepost, grouped
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.pre = torch.nn.Parameter(torch.linspace(1.5, 0.5, width))
        self.post = torch.nn.Parameter(torch.linspace(-1.0, 1.0, width))

    def layer(self, hiddens: list[Tensor], weights: Tensor, deferral: ops.Deferral | None) -> Any:
        if self.norms == "none":
            return ops.depth_aggregate_chained(hiddens, weights, deferral)
        return ops.depth_aggregate_norm_chained(
            hiddens,
            weights,
            [self.scale, None, None],
            norm=self.norms,
            add_newest=self.prepost,
            pre_weight=self.pre if self.prepost else None,
            post_weight=self.post if self.prepost else None,
            deferral=deferral,
        )

    def forward(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        hiddens, deferrals = [x], {}
        for i, w in enumerate(weights):
            if i == 2 and self.grouped:
                older, opened = ops.defer_gradients(hiddens[:-1], [(3, v.shape[-1]) for v in weights[2:]])
                hiddens, deferrals = [*older, hiddens[-1]], dict(enumerate(opened, start=2))
            (a, b, c), hiddens = self.layer(hiddens, w, deferrals.get(i))
            hiddens = [*hiddens, torch.tanh(a) * torch.sigmoid(b) + c]
        return sum((h.float() if h.dtype != torch.float64 else h).square().mean() for h in hiddens)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of two tensors, as a fraction of the length of the expected one."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def chain_inputs(width: int, device: torch.device, dtype: torch.dtype, tokens: int = 6) -> tuple[Tensor, list[Tensor]]:
    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device, dtype=torch.float64) / 2).to(dtype).requires_grad_()

    return make(tokens, width), [make(tokens, 3, i + 1) for i in range(5)]


@pytest.mark.parametrize("norms,prepost", [("none", False), ("rms", False), ("layer", True), ("rms", True)])
@pytest.mark.parametrize("width", [13, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_groups_give_the_gradients_of_single_layers(
    norms: str, prepost: bool, width: int, device: torch.device, dtype: torch.dtype
) -> None:
    x, weights = chain_inputs(width, device, dtype)
    wide = x.detach().double().requires_grad_(), [w.detach().double().requires_grad_() for w in weights]
    results = []
    for grouped in (True, False, None):  # None: single layers in float64
        if grouped is None:
            x, weights = wide
        chain = Chain(width, norms, prepost, grouped).to(device, x.dtype)
        inputs = [
            x,
            *weights,
            *([] if norms == "none" else [chain.scale]),
            *([chain.pre, chain.post] if prepost else []),
        ]
        loss = chain(x, weights)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        results.append(first)
    for a, b, w in zip(*results, strict=True):
        # Of all entries together: with few of them the largest error is a matter of luck.
        assert distance(a, w) <= max(2 * distance(b, w), 2 * tolerance(dtype))


@pytest.mark.parametrize("normed", [False, True])
def test_gradient_of_the_handed_on_newest_alone(normed: bool, device: torch.device) -> None:
    """A layer whose streams go unused has nothing to defer, but its norm of the newest hidden state has a gradient."""
    hiddens = [torch.randn(5, 16, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = torch.randn(5, 3, 2, device=device, dtype=torch.float64)
    scale = torch.linspace(0.5, 1.5, 16, device=device, dtype=torch.float64)
    older, (deferral,) = ops.defer_gradients(hiddens[:1], [(3, 2)])
    norms = [scale if normed else None, None, None]
    _, handed_on = ops.depth_aggregate_norm_chained(
        [*older, hiddens[1]], weights, norms, pre_weight=scale, deferral=deferral
    )
    handed_on[1].square().sum().backward()
    naive = hiddens[1].detach().requires_grad_()
    torch.nn.functional.rms_norm(naive, (16,), scale, 1e-6).square().sum().backward()
    torch.testing.assert_close(hiddens[1].grad, naive.grad)


@pytest.mark.parametrize("norms,prepost", [("none", False), ("rms", True)])
def test_gradcheck(norms: str, prepost: bool, device: torch.device) -> None:
    x, weights = chain_inputs(8, device, torch.float64, tokens=2)
    chain = Chain(8, norms, prepost, grouped=True).to(device, torch.float64)
    assert torch.autograd.gradcheck(lambda x, *weights: chain(x, list(weights)), (x, *weights))


def test_hooks_and_unused_layers(device: torch.device) -> None:
    """A hook on an older hidden state sees its whole gradient once; a layer that nothing uses defers nothing."""
    x = torch.randn(4, 16, device=device, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 2, 2, device=device, dtype=torch.float64) for _ in range(3)]
    seen = []
    h = x * 2
    h.register_hook(seen.append)
    older, deferrals = ops.defer_gradients([h], [(2, 2)] * 3)
    newest = torch.randn(4, 16, device=device, dtype=torch.float64)
    outputs = [ops.depth_aggregate_chained([*older, newest], w, d)[0] for w, d in zip(weights, deferrals, strict=True)]
    (outputs[0][0].sum() + outputs[2][1].sum() + older[0].sum()).backward()
    expected = 1 + weights[0][:, 0, :1] + weights[2][:, 1, :1]
    assert len(seen) == 1
    assert relative_error(seen[0], expected.expand(4, 16)) < 1e-12
    assert relative_error(x.grad, 2 * expected.expand(4, 16)) < 1e-12
    untouched, _ = ops.defer_gradients([x], [(2, 2)])
    (grad,) = torch.autograd.grad(untouched[0].sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_frozen_older_hidden_states(device: torch.device) -> None:
    x = torch.randn(4, 16, device=device)
    weights = torch.randn(4, 2, 2, device=device, requires_grad=True)
    older, (deferral,) = ops.defer_gradients([x], [(2, 2)])
    (y, _), _ = ops.depth_aggregate_chained([*older, x + 1], weights, deferral)
    y.sum().backward()
    assert relative_error(weights.grad[:, 0, 0], x.sum(-1)) < 1e-5


def test_autocast(device: torch.device) -> None:
    x, weights = chain_inputs(16, device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        older, deferrals = ops.defer_gradients([x], [(3, 2)])
        streams, handed_on = ops.depth_aggregate_chained([*older, x], weights[1], deferrals[0])
    assert {t.dtype for t in [*older, *streams, *handed_on, *deferrals[0].tickets]} == {torch.bfloat16}
    sum(s.float().sum() for s in streams).backward()
    assert x.grad.dtype == weights[1].grad.dtype == torch.float32
    grads = []
    for grouped, low in ((True, True), (False, True), (False, False)):
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = Chain(16, "rms", True, grouped).to(device)(x, weights)
        grads.append(torch.autograd.grad(loss, [x, *weights]))
    for a, b, w in zip(*grads, strict=True):
        assert distance(a, w.double()) <= max(2 * distance(b, w.double()), 2 * tolerance(torch.bfloat16))


@pytest.mark.compile
@pytest.mark.parametrize("norms,prepost", [("none", False), ("rms", True)])
def test_compiles_without_a_break_or_recompiling(norms: str, prepost: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    chain = Chain(16, norms, prepost, grouped=True).to(device)
    compiled = torch.compile(chain, fullgraph=True, dynamic=True)
    for tokens in (6, 10, 14):
        x, weights = chain_inputs(16, device, torch.float32, tokens)
        expected = torch.autograd.grad(chain(x, weights), [x, *weights])
        with torch._dynamo.config.patch(error_on_recompile=tokens > 6):
            actual = torch.autograd.grad(compiled(x, weights), [x, *weights])
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.compile
@pytest.mark.parametrize("norms,prepost", [("none", False), ("rms", True)])
def test_compiled_autograd(norms: str, prepost: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    x, weights = chain_inputs(16, device, torch.float32)
    chain = Chain(16, norms, prepost, grouped=True).to(device)
    expected = torch.autograd.grad(chain(x, weights), [x, *weights])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        chain(x, weights).backward()
    for a, b in zip([x, *weights], expected, strict=True):
        assert relative_error(a.grad, b) < 1e-5


def bad_calls() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x, w = torch.randn(2, 8), torch.randn(2, 3, 2)
    tickets = ops.defer_gradients([x], [(3, 2)])[1][0].tickets
    flush, defer = torch.ops.muddformer.deferred_flush, ops.defer_gradients

    def layer(tickets: list[Tensor], count: int) -> Any:
        return ops.depth_aggregate_chained([x, x], w, ops.Deferral(tickets, count))

    def norm_layer(tickets: list[Tensor], count: int) -> Any:
        return ops.depth_aggregate_norm_chained([x, x], w, [None] * 3, deferral=ops.Deferral(tickets, count))

    def narrow(call: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    def newest_layer(**options: Any) -> Any:
        deferral = ops.Deferral(defer([x], [(3, 1)])[1][0].tickets, 1)
        return ops.depth_aggregate_norm_chained([x], w[..., :1], [None] * 3, deferral=deferral, **options)

    newest_kept = ValueError, "deferred: expected fewer than the 1 hidden states"
    return {
        "newest added": (lambda: newest_layer(add_newest=True), *newest_kept),
        "newest normed": (lambda: newest_layer(pre_weight=torch.ones(8)), *newest_kept),
        "no hiddens": (lambda: defer([], [(3, 2)]), ValueError, "hiddens: expected at least one"),
        "one tensor": (lambda: defer(x, [(3, 2)]), TypeError, "hiddens: expected a list of tensors"),
        "bare numbers": (lambda: defer([x], [3]), TypeError, r"layers\[0\]: expected a tuple \(C, S\)"),
        "no layers": (lambda: defer([x], []), ValueError, "ways: expected a number for each layer"),
        "no ways": (lambda: defer([x], [(0, 2)]), ValueError, r"ways\[0\]: expected at least 1"),
        "few sources": (lambda: defer([x, x], [(3, 1)]), ValueError, r"sources\[0\]: expected at least 2"),
        "many ways": (lambda: defer([x], [(10**12, 2)]), ValueError, r"ways\[0\]: expected at most 65536 ways"),
        "many together": (lambda: defer([x], [(2**15, 2)] * 3), ValueError, r"ways\[2\]: expected at most 65536 ways"),
        "many sources": (lambda: defer([x], [(3, 10**12)]), ValueError, r"sources\[0\]: expected at most 65536"),
        "beyond 64 bits": (lambda: defer([x], [(2**70, 2)]), ValueError, r"layers\[0\]: expected two integers of 64"),
        "integers": (lambda: defer([x.int()], [(3, 2)]), TypeError, r"hiddens\[0\]: expected dtype"),
        "few tickets": (lambda: layer(tickets[:2], 1), ValueError, "tickets: expected 4 tensors"),
        "ticket shape": (lambda: layer([*tickets[1:], tickets[0]], 1), ValueError, r"tickets\[2\]: expected shape"),
        "ticket dtype": (lambda: layer([t.double() for t in tickets], 1), TypeError, r"tickets\[0\]: expected dtype"),
        "count": (lambda: layer(tickets, 3), ValueError, "deferred: expected 0 to S = 2"),
        "negative": (lambda: layer(tickets, -1), ValueError, "deferred: expected 0 to S = 2"),
        "norm tickets": (lambda: norm_layer(tickets[:2], 1), ValueError, "tickets: expected 4 tensors"),
        "no tickets": (lambda: layer([], 1), ValueError, "tickets: expected 4 tensors, .* got 0"),
        "no tickets, autocast": (
            lambda: narrow(lambda: layer([], 1)),
            ValueError,
            "tickets: expected 4 tensors, .* got 0",
        ),
        "no norm tickets, autocast": (lambda: narrow(lambda: norm_layer([], 1)), ValueError, "tickets: expected 4 ten"),
        "a tuple": (
            lambda: ops.depth_aggregate_chained([x, x], w, (tickets, 1)),
            TypeError,
            "deferral: expected a Def",
        ),
        "norm count": (lambda: norm_layer(tickets, 3), ValueError, "deferred: expected 0 to S = 2"),
        "flush nothing": (lambda: flush([], [x] * 3, [w]), ValueError, "grad_hiddens: expected at least one"),
        "no weights": (lambda: flush([x], [x] * 3, []), ValueError, "weights: expected at least one layer"),
        "no sums": (lambda: flush([x], [None] * 3, [w]), ValueError, "grad_sums: expected at least one tensor"),
        "few sums": (lambda: flush([x], [x] * 2, [w]), ValueError, "grad_sums: expected 3 entries"),
        "sum shape": (lambda: flush([x], [x, x[:1], x], [w]), ValueError, r"grad_sums\[1\]: expected shape"),
        "grad dtype": (lambda: flush([x.double()], [x] * 3, [w]), TypeError, r"grad_hiddens\[0\]: expected dtype"),
        "weights shape": (lambda: flush([x] * 3, [x] * 3, [w]), ValueError, r"weights\[0\]: expected shape"),
        "backward": (
            lambda: torch.ops.muddformer.depth_aggregate_backward([x] * 3, [], [x, x], w, 3),
            ValueError,
            "deferred: expected 0 to S = 2",
        ),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_arguments(name: str) -> None:
    call, error, message = bad_calls()[name]
    with pytest.raises(error, match=message):
        call()
