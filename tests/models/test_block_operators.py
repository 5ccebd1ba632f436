"""Blocks out of the library's operators, which they are on CUDA, compute what their single steps compute."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from helpers.models import VARIANTS, make, scramble, some_ids
from helpers.naive_model import check_against_naive
from muddformer.models import layers

OPERATORS = {"linear", "qk_norm_rotary", "swiglu", "add_norm"}


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on the CPU are made of operators too."""
    monkeypatch.setattr(layers, "runs_operators", lambda x: type(x) is Tensor)


class Called(TorchDispatchMode):
    """Names of the operators of a block that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "muddformer":
            self.names.add(name.removesuffix("_forward"))
        return func(*args, **(kwargs or {}))


def called(run: Callable[[], object]) -> set[str]:
    with Called() as found:
        run()
    return found.names & OPERATORS


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_naive(variant: str) -> None:
    check_against_naive(variant)


@pytest.mark.usefixtures("operators")
def test_operators_are_used() -> None:
    ids = some_ids()
    assert called(lambda: make(use_qk_norm=True)(ids)) == OPERATORS
    assert called(lambda: make("plain")(ids)) == OPERATORS
    assert called(lambda: make("pythia")(ids)) == {"linear", "qk_norm_rotary"}  # GELU, a parallel residual


@pytest.mark.usefixtures("operators")
def test_selective_checkpointing_keeps_products() -> None:
    ids, calls = some_ids(), []
    kept = [torch.ops.muddformer.linear_forward.default]
    for context_fn in (None, functools.partial(create_selective_checkpoint_contexts, kept)):
        model = make()
        model.gradient_checkpointing, model.checkpoint_context_fn = True, context_fn
        loss = model(ids, ids)
        calls.append(called(loss.backward))
    assert calls == [OPERATORS, OPERATORS - {"linear"}]


class Doubled(nn.Module):
    """Twice what another module returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return 2 * self.inner(*args)


PARTS = [
    "attention",
    "attention.wq",
    "attention.wv",
    "attention.wo",
    "attention.k_norm",
    "feed_forward",
    "feed_forward.w1",
    "feed_forward.w2",
    "ffn_norm",
]


@pytest.mark.parametrize("change", ["replaced", "hook"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", ["default", "pythia", "plain"])
def test_parts_are_not_bypassed(variant: str, part: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = scramble(make(variant, use_qk_norm=True)).double(), some_ids()
    untouched = model(ids)
    parent, _, name = part.rpartition(".")
    owner = model.layers[1].get_submodule(parent)
    if change == "replaced":
        setattr(owner, name, Doubled(getattr(owner, name)))
    else:
        getattr(owner, name).register_forward_hook(lambda _module, _args, y: 2 * y)
    expected = model(ids)
    assert not torch.allclose(expected, untouched)
    monkeypatch.setattr(layers, "runs_operators", lambda x: type(x) is Tensor)
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["default", "plain", "pythia-sequential"])
def test_dtypes_that_meet(
    variant: str, dtype: torch.dtype, norms: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever single steps compute, operators do, or leave it to the steps."""
    model, ids = make(variant, use_qk_norm=True).to(dtype), some_ids()
    for layer in model.layers:
        layer.ffn_norm.to(norms)
    results = []
    for operators in (False, True):
        monkeypatch.setattr(layers, "runs_operators", lambda x, on=operators: on and type(x) is Tensor)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            try:
                results.append(model(ids).float())
            except (RuntimeError, TypeError):  # torch's products refuse two dtypes
                results.append(None)
    if results[0] is not None:
        torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("operators")
def test_a_feed_forward_network_that_is_called_gets_the_dtype_of_the_stream() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    model = make("plain")
    model.layers[1].feed_forward = Watching()
    with torch.autocast("cpu", torch.bfloat16):
        model(some_ids())
    assert seen == [torch.float32]


@pytest.mark.usefixtures("operators")
def test_positions_may_be_a_pair() -> None:
    model = make()
    x, rotary = torch.randn(1, 7, model.config.dim), model.rotary(7)
    block = model.layers[0]
    assert torch.equal(block(x, rotary=tuple(rotary)), block(x, rotary=rotary))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.cpu().double() for name, parameter in model.named_parameters()}


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the differences."""
    return {name: float((found[name] - grad).norm()) for name, grad in wanted.items()}


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_cuda(variant: str, autocast: bool) -> None:
    exact = scramble(make(variant, dim=64, use_qk_norm=True), 0.05).double()
    ids, targets = some_ids(2, 24), some_ids(2, 24)
    wanted = gradients(exact, exact(ids, targets))
    errors = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(exact).float().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(ids.to(device), targets.to(device))
        errors.append(math.hypot(*distances(gradients(model, loss), wanted).values()))
    size = math.hypot(*(float(grad.norm()) for grad in wanted.values()))
    assert errors[1] <= 2 * errors[0] + 1e-6 * size


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["default", "pythia", "plain", "stride-2x2"])
def test_compiled_on_cuda(variant: str, checkpointing: bool) -> None:
    """Compiled models are as near to float64 as eager ones, both under autocast."""
    exact = scramble(make(variant, dim=64, use_qk_norm=True), 0.05).double()
    model = copy.deepcopy(exact).float().cuda()
    model.gradient_checkpointing = checkpointing
    ids, targets = some_ids(2, 24), some_ids(2, 24)
    wanted = gradients(exact, exact(ids, targets))
    losses, errors = [], []
    for run in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(ids.cuda(), targets.cuda())
        losses.append(loss.detach())
        errors.append(distances(gradients(model, loss), wanted))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=float(losses[0].abs()) * 0.02 + 1e-6)
    assert math.hypot(*errors[1].values()) <= 2 * math.hypot(*errors[0].values())
    for name, eager in errors[0].items():
        assert errors[1][name] <= 2 * eager + 0.02 * float(wanted[name].norm()) + 1e-6, name


@pytest.mark.cuda
def test_operators_are_used_on_cuda() -> None:
    model, ids = make(use_qk_norm=True).cuda(), some_ids().cuda()
    assert called(lambda: model(ids)) == OPERATORS
