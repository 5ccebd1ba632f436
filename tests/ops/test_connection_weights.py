"""connection_weights, its chained form and its backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.op_samples import DTYPES, WeightsSample, relative_error, tolerance, weights_samples
from muddformer import ops, reference

NAMES = [sample.name for sample in weights_samples(torch.device("cpu"), torch.float32)]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def find(name: str, device: torch.device, dtype: torch.dtype) -> WeightsSample:
    return next(sample for sample in weights_samples(device, dtype) if sample.name == name)


def run(function, sample: WeightsSample):
    return function(sample.x, sample.w1, sample.w2, sample.prior, **sample.options)


def positional(sample: WeightsSample) -> tuple:
    """Arguments in the order of the schema."""
    o = sample.options
    options = (o.get("scale"), o.get("eps", 1e-6), o.get("gelu_approximate", "none"), o.get("cap"))
    return sample.x, sample.w1, sample.w2, sample.prior, *options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    sample = find(name, device, dtype)
    check_against_float64(sample, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_prior_and_scale(device: torch.device, dtype: torch.dtype) -> None:
    check_against_float64(find("float32-prior-and-scale", device, dtype), dtype)


def check_against_float64(sample: WeightsSample, dtype: torch.dtype) -> None:
    ours, wide = sample.detached(), sample.detached(torch.float64)
    weights = run(ops.connection_weights, ours)
    expected = run(reference.connection_weights, wide)
    assert weights.dtype == dtype
    assert weights.shape == (*sample.x.shape[:-1], *sample.prior.shape)
    assert relative_error(weights, expected) < tolerance(dtype)
    grad = torch.randn_like(weights)
    weights.backward(grad)
    expected.backward(grad.double())
    for a, b in zip(ours.tensors(), wide.tensors(), strict=True):
        assert a.grad.dtype == a.dtype
        assert a.grad.shape == a.shape
        assert relative_error(a.grad, b.grad) < 3 * tolerance(dtype)


def test_chained_joins_the_gradient_of_x(name: str, device: torch.device) -> None:
    sample = find(name, device, torch.float64)
    ours, wide = sample.detached(), sample.detached()
    weights, x = run(ops.connection_weights_chained, ours)
    (weights.square().sum() + x.pow(3).sum()).backward()
    (run(reference.connection_weights, wide).square().sum() + wide.x.pow(3).sum()).backward()
    for a, b in zip(ours.tensors(), wide.tensors(), strict=True):
        assert relative_error(a.grad, b.grad) < tolerance(torch.float64)


def test_chained_with_x_used_alone(device: torch.device) -> None:
    sample = find("everything", device, torch.float32).detached()
    _, x = run(ops.connection_weights_chained, sample)
    x.sum().backward()
    assert torch.equal(sample.x.grad, torch.ones_like(sample.x))
    assert sample.w1.grad is None


@pytest.mark.parametrize("chained", [False, True])
def test_gradcheck(name: str, device: torch.device, chained: bool) -> None:
    sample = find(name, device, torch.float64).detached()
    options = {key: value for key, value in sample.options.items() if key != "scale"}

    def function(x: Tensor, w1: Tensor, w2: Tensor, prior: Tensor, scale: Tensor | None = None):
        op = ops.connection_weights_chained if chained else ops.connection_weights
        return op(x, w1, w2, prior, scale=scale, **options)

    assert torch.autograd.gradcheck(function, sample.tensors(), fast_mode=True)


def test_opcheck(name: str, device: torch.device) -> None:
    private = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dtype in (torch.float32, torch.bfloat16):
        sample = find(name, device, dtype)
        leaves = sample.detached()
        torch.library.opcheck(torch.ops.muddformer.connection_weights, positional(leaves))
        forward = torch.ops.muddformer.connection_weights_forward
        torch.library.opcheck(forward, positional(sample), test_utils=private)
        kept = forward(*positional(sample))
        grad = torch.randn_like(kept[0])
        *tensors, _, approximate, cap = positional(sample)
        for incoming, wanted in ((None, (False, True, False, False, True)), (torch.randn_like(sample.x), (True,) * 5)):
            torch.library.opcheck(
                torch.ops.muddformer.connection_weights_backward,
                (grad, incoming, *tensors, *kept, approximate, cap, wanted),
                test_utils=private,
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_that_are_not_wanted(device: torch.device, dtype: torch.dtype) -> None:
    """Any one gradient alone is the same as among all, and the others are not made."""
    everything = find("everything", device, dtype)

    def gradients(wanted: list[int]) -> list[Tensor | None]:
        leaves = everything.detached()
        for i, leaf in enumerate(leaves.tensors()):
            leaf.requires_grad_(i in wanted)
        weights, x = run(ops.connection_weights_chained, leaves)
        (weights.square().sum() + x.square().sum()).backward()
        return [leaf.grad for leaf in leaves.tensors()]

    expected = gradients(list(range(5)))
    for i in range(5):
        grads = gradients([i])
        assert torch.equal(grads[i], expected[i])
        assert all(grad is None for j, grad in enumerate(grads) if j != i)


@pytest.mark.cuda
@pytest.mark.parametrize("scaled", [False, True])
def test_cuda_repeats_and_is_captured(scaled: bool) -> None:
    """Bit for bit, launched or replayed from a CUDA graph."""
    device = torch.device("cuda")
    shapes = [(700, 512), (64, 512), (36, 64), (4, 9), (512,)]
    factors = [1, 512**-0.5, 64**-0.5, 1, 1]
    x, w1, w2, prior, scale = (
        torch.randn(s, device=device).mul(f).bfloat16() for s, f in zip(shapes, factors, strict=True)
    )
    inputs = (x, w1, w2, prior, scale if scaled else None)
    grad = torch.randn(700, 4, 9, device=device).bfloat16()

    def step() -> tuple[Tensor, ...]:
        kept = torch.ops.muddformer.connection_weights_forward(*inputs, cap=5.0)
        grads = torch.ops.muddformer.connection_weights_backward(grad, x, *inputs, *kept, "none", 5.0, (True,) * 5)
        return *kept, *grads

    first = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        graph.replay()
        for a, b, c in zip(first, captured, step(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_error_is_at_most_twice_that_of_eager(device: torch.device, dtype: torch.dtype, approximate: str) -> None:
    """Against float64; three times for the gradients."""
    width, k, ways, sources = 256, 64, 4, 13
    shapes = [(128, width), (k, width), (ways * sources, k), (ways, sources), (width,)]
    scales = [1, width**-0.5, k**-0.5, 1, 1]
    values = [torch.randn(s, device=device).mul(f).to(dtype) for s, f in zip(shapes, scales, strict=True)]
    grad = torch.randn(128, ways, sources, device=device).to(dtype)

    def evaluate(function, cast: torch.dtype) -> list[Tensor]:
        leaves = [t.to(cast).detach().requires_grad_() for t in values]
        a = function(*leaves[:4], scale=leaves[4], eps=1e-6, gelu_approximate=approximate, cap=10.0)
        a.backward(grad.to(cast))
        return [a.detach(), *(leaf.grad for leaf in leaves)]

    exact = evaluate(reference.connection_weights, torch.float64)
    eager = evaluate(reference.connection_weights, dtype)
    ours = evaluate(ops.connection_weights, dtype)
    for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        assert relative_error(a, c) <= (2 if i == 0 else 3) * relative_error(b, c) + 1e-7


def test_fresh_generator_gives_the_prior(device: torch.device) -> None:
    """W2 = 0, as initialised for training: the weights are the static prior, whatever x is."""
    prior = torch.randn(4, 3, device=device)
    weights = ops.connection_weights(
        torch.randn(2, 5, 16, device=device),
        torch.randn(8, 16, device=device),
        torch.zeros(12, 8, device=device),
        prior,
    )
    assert torch.equal(weights, prior.expand(2, 5, 4, 3))


def test_double_backward_names_the_op(device: torch.device) -> None:
    sample = find("plain", device, torch.float64).detached()
    (grad,) = torch.autograd.grad(run(ops.connection_weights, sample).square().sum(), sample.x, create_graph=True)
    with pytest.raises(RuntimeError, match="connection_weights_backward"):
        grad.sum().backward()


def test_autocast(device: torch.device) -> None:
    """x and the projections take the autocast dtype; backward inside and outside of the region is the same."""
    grads = []
    for inside in (False, True):
        sample = find("everything", device, torch.float32).detached()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            weights, x = run(ops.connection_weights_chained, sample)
            if inside:
                weights.float().square().sum().backward()
        if not inside:
            weights.float().square().sum().backward()
        assert weights.dtype == x.dtype == torch.bfloat16
        grads.append([t.grad for t in sample.tensors()])
        assert {g.dtype for g in grads[-1]} == {torch.float32}
        torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_meta(name: str) -> None:
    sample = find(name, torch.device("cpu"), torch.float32)
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in sample.options.items()}
    tensors = (sample.x, sample.w1, sample.w2, sample.prior)
    weights = ops.connection_weights(*(t.to("meta") for t in tensors), **options)
    assert weights.is_meta
    assert weights.shape == (*sample.x.shape[:-1], *sample.prior.shape)


@pytest.mark.compile
def test_compile_fullgraph_without_recompiling(device: torch.device) -> None:
    """One graph for any number of tokens, with gradients equal to eager's."""
    torch._dynamo.reset()

    def function(x: Tensor, w1: Tensor, w2: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
        weights, x = ops.connection_weights_chained(x, w1, w2, prior, scale=scale, cap=3.0)
        streams, _ = ops.depth_aggregate_chained([x, x.sin()], weights)
        return sum(s.square().mean() for s in streams)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    shapes = [(8, 16), (8, 8), (4, 2), (16,)]
    for tokens in (6, 9, 17):
        values = [torch.randn(s, device=device) for s in [(tokens, 16), *shapes]]
        eager, ours = ([t.clone().requires_grad_() for t in values] for _ in range(2))
        function(*eager).backward()
        with torch._dynamo.config.patch(error_on_recompile=tokens != 6):
            compiled(*ours).backward()
        for a, b in zip(ours, eager, strict=True):
            assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.compile
def test_export(device: torch.device) -> None:
    sample = find("everything", device, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.connection_weights(x, sample.w1, sample.w2, sample.prior, **sample.options)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Layer(), (sample.x,), dynamic_shapes={"x": {0: tokens}})
    x = torch.randn(9, *sample.x.shape[1:], device=device)
    assert relative_error(program.module()(x), Layer()(x)) < 1e-6
