"""linear and its backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from helpers.op_samples import DTYPES, LinearSample, linear_samples, relative_error, tolerance
from muddformer import ops, reference

NAMES = [sample.name for sample in linear_samples(torch.device("cpu"), torch.bfloat16)]


def find(name: str, device: torch.device, dtype: torch.dtype) -> LinearSample:
    return next(sample for sample in linear_samples(device, dtype) if sample.name == name)


def output_and_gradients(function, sample: LinearSample, dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = sample.detached(dtype)
    y = function(*leaves.arguments())
    y.backward(torch.linspace(-1, 2, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype))
    return [y, *(t.grad for t in leaves.tensors())]


def check(sample: LinearSample, dtype: torch.dtype) -> None:
    """As near to float64 as PyTorch's steps are, but for a factor of two."""
    ours, naive = (output_and_gradients(f, sample) for f in (ops.linear, reference.linear))
    wide = output_and_gradients(reference.linear, sample, torch.float64)
    for i, (a, b, w) in enumerate(zip(ours, naive, wide, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, w) <= max(2 * relative_error(b, w), tolerance(dtype)), i


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if name.startswith("float32"):
        dtype = {torch.float64: torch.bfloat16, torch.float32: torch.float16}.get(dtype, dtype)
    check(find(name, device, dtype), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 7, 4096])
@pytest.mark.parametrize(("width", "out"), [(1024, 2816), (2050, 1000), (72, 136)])
def test_large(tokens: int, width: int, out: int) -> None:
    def make(*shape: int, like: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda").to(like)

    weight, bias = make(out, width, like=torch.float32) / width**0.5, make(out, like=torch.float32)
    for residual in (make(tokens, out), make(tokens, out, like=torch.float32)):
        check(LinearSample("large", make(tokens, width), weight, bias, residual), torch.bfloat16)


def test_gradcheck(device: torch.device) -> None:
    for name in ("everything", "strided", "plain"):
        leaves = find(name, device, torch.float64).detached()
        bias, residual = leaves.bias is not None, leaves.residual is not None

        def call(x: Tensor, weight: Tensor, *rest: Tensor, bias: bool = bias, residual: bool = residual) -> Tensor:
            return ops.linear(x, weight, rest[0] if bias else None, rest[-1] if residual else None)

        assert torch.autograd.gradcheck(call, leaves.tensors(), fast_mode=True)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (0, 1, 2)], ids=str)
def test_frozen_inputs(frozen: tuple[int, ...], device: torch.device) -> None:
    """Gradients that nothing needs are not made; the others are the same."""
    leaves = find("everything", device, torch.float64).detached()
    wanted = [t for i, t in enumerate(leaves.tensors()) if i not in frozen]
    expected = torch.autograd.grad(ops.linear(*leaves.arguments()).square().sum(), wanted)
    for i in frozen:
        leaves.tensors()[i].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        actual = torch.autograd.grad(ops.linear(*leaves.arguments()).square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    product = 2 * leaves.x.numel() * leaves.weight.shape[0]
    assert counter.get_total_flops() == product * (1 + sum(i not in frozen for i in (0, 1)))


def test_second_derivatives_are_refused(device: torch.device) -> None:
    leaves = find("plain", device, torch.float64).detached()
    (grad,) = torch.autograd.grad(ops.linear(leaves.x, leaves.weight).square().sum(), leaves.x, create_graph=True)
    with pytest.raises(RuntimeError, match="muddformer::linear_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["everything", "no-tokens", "transposed"])
def test_opcheck(name: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    sample = find(name, device, dtype)
    opcheck(torch.ops.muddformer.linear.default, tuple(sample.detached().arguments()), test_utils=utils)
    opcheck(torch.ops.muddformer.linear_forward.default, tuple(sample.arguments()), test_utils=utils)
    backward = torch.ops.muddformer.linear_backward.default
    for wanted in ([True, True, True], [False, True, False]):
        arguments = (torch.randn_like(sample.residual), sample.x, sample.weight, torch.float32, wanted)
        opcheck(backward, arguments, test_utils=utils)


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(parameters: torch.dtype, residual: torch.dtype, device: torch.device) -> None:
    """The product is in the autocast dtype; gradients of parameters are in their own, and float32 is never rounded."""
    sample = find("everything", device, torch.float32)
    sample.weight, sample.bias = sample.weight.to(parameters), sample.bias.to(parameters)
    sample.residual = sample.residual.to(residual)
    leaves = sample.detached()
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.linear(*leaves.arguments())
        ops.linear(*leaves.arguments())  # with the copies that autocast has by now
    grad = torch.linspace(-1, 2, y.numel(), device=device).view(y.shape).to(y.dtype)
    y.backward(grad)
    assert y.dtype == residual
    assert [t.grad.dtype for t in leaves.tensors()] == [torch.float32, parameters, parameters, residual]
    wide = output_and_gradients(reference.linear, sample, torch.float64)
    for a, w in zip([y, *(t.grad for t in leaves.tensors())], wide, strict=True):
        assert relative_error(a, w) < tolerance(torch.bfloat16)
    if parameters == torch.float32 and device.type == "cuda":
        assert not torch.equal(leaves.weight.grad, leaves.weight.grad.bfloat16().float())


@pytest.mark.compile
def test_compiles_without_a_break_or_recompiling(device: torch.device) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return ops.linear(x.tanh(), weight, bias, residual).float().square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 10, 14):
        shapes = ((tokens, 16), (40, 16), (40,), (tokens, 40))
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        with torch._dynamo.config.patch(error_on_recompile=tokens > 6):
            actual = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-2


@pytest.mark.cuda
def test_captured_by_a_graph() -> None:
    sample = find("everything", torch.device("cuda"), torch.bfloat16)
    expected = ops.linear(*sample.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(*sample.arguments())
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_repeats_bit_for_bit(device: torch.device) -> None:
    sample = find("everything", device, torch.bfloat16)
    first, second = (output_and_gradients(ops.linear, sample) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
