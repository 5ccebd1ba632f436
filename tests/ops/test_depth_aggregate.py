"""depth_aggregate, its chained form and its backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.op_samples import DTYPES, AggregateSample, aggregate_samples, relative_error, tolerance
from muddformer import ops, reference

NAMES = [sample.name for sample in aggregate_samples(torch.device("cpu"), torch.float32)]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def find(name: str, device: torch.device, dtype: torch.dtype) -> AggregateSample:
    return next(sample for sample in aggregate_samples(device, dtype) if sample.name == name)


def unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    sample = find(name, device, dtype)
    ours, wide = sample.detached(), sample.detached(torch.float64)
    outputs = ops.depth_aggregate(ours.hiddens, ours.weights)
    expected = reference.depth_aggregate(wide.hiddens, wide.weights)
    assert len(outputs) == sample.weights.shape[-2]
    for y, z in zip(outputs, expected, strict=True):
        assert y.dtype == dtype
        assert y.shape == sample.hiddens[0].shape
        assert relative_error(y, z) < tolerance(dtype)
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    for a, b in zip([*ours.hiddens, ours.weights], [*wide.hiddens, wide.weights], strict=True):
        assert a.grad.dtype == dtype
        assert relative_error(a.grad, b.grad) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chained_gives_the_gradients_of_a_stack(device: torch.device, dtype: torch.dtype) -> None:
    """Three aggregations over one growing history, chained, against float64 autograd that adds."""

    def run(hiddens: list[Tensor], weights: list[Tensor], chained: bool) -> Tensor:
        history, total = hiddens[:2], 0
        for i, w in enumerate(weights):
            if chained:
                streams, history = ops.depth_aggregate_chained(history, w)
            else:
                streams = reference.depth_aggregate(history, w)
            total = total + sum((s.double() * (c + 1)).square().mean() for c, s in enumerate(streams))
            history = [*history, hiddens[2 + i] + streams[0] * 0.5]
        return total

    hiddens = [torch.randn(3, 4, 20, device=device).to(dtype) for _ in range(5)]
    weights = [torch.randn(3, 4, 4, 2 + i, device=device).to(dtype) for i in range(3)]
    ours = [t.clone().requires_grad_() for t in hiddens + weights]
    wide = [t.double().requires_grad_() for t in hiddens + weights]
    run(ours[:5], ours[5:], True).backward()
    run(wide[:5], wide[5:], False).backward()
    for a, b in zip(ours, wide, strict=True):
        if b.grad is None:
            assert a.grad is None or not a.grad.any()
        else:
            assert relative_error(a.grad, b.grad) < 3 * tolerance(dtype)


def test_chained_autograd_adds_nothing(device: torch.device) -> None:
    """The point of the chain: the trace of a backward holds no addition of hidden states."""
    size = (64, 96)
    history = [torch.randn(size, device=device, requires_grad=True) for _ in range(6)]
    weights = [torch.randn(64, 4, 6, device=device, requires_grad=True) for _ in range(4)]
    loss, current = 0, history
    for w in weights:
        streams, current = ops.depth_aggregate_chained(current, w)
        loss = loss + torch.stack([s.sum() for s in streams]).sum()
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    adds = [
        e
        for e in profile.events()
        if e.name.startswith("aten::add") and e.input_shapes and list(size) in e.input_shapes
    ]
    assert not adds


def test_chained_hands_its_sources_on(device: torch.device) -> None:
    sample = find("same-tensor-twice", device, torch.float32)
    _, handed_on = ops.depth_aggregate_chained(sample.hiddens, sample.weights)
    assert all(a is b for a, b in zip(handed_on, sample.hiddens, strict=True)), "without gradients: the same tensors"
    leaves = sample.detached()
    _, handed_on = ops.depth_aggregate_chained(leaves.hiddens, leaves.weights)
    for a, b in zip(handed_on, leaves.hiddens, strict=True):
        assert a.data_ptr() == b.data_ptr()
        assert a.grad_fn is not None


def test_only_the_handed_on_sources_are_used(device: torch.device) -> None:
    leaves = find("sliced-width", device, torch.float32).detached()
    _, handed_on = ops.depth_aggregate_chained(leaves.hiddens, leaves.weights)
    sum(x.sum() for x in handed_on).backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in leaves.hiddens)
    assert leaves.weights.grad is None


def test_undefined_gradient_of_some_outputs(device: torch.device) -> None:
    sample = find("tokens(2, 5)-D130-S13-C4", device, torch.float64)
    ours, wide = sample.detached(), sample.detached()
    streams, handed_on = ops.depth_aggregate_chained(ours.hiddens, ours.weights)
    (streams[1].square().sum() + handed_on[3].square().sum()).backward()
    expected = reference.depth_aggregate(wide.hiddens, wide.weights)
    (expected[1].square().sum() + wide.hiddens[3].square().sum()).backward()
    for a, b in zip([*ours.hiddens, ours.weights], [*wide.hiddens, wide.weights], strict=True):
        assert relative_error(a.grad, b.grad) < tolerance(torch.float64)


@pytest.mark.parametrize("chained", [False, True])
def test_gradcheck(name: str, device: torch.device, chained: bool) -> None:
    sample = find(name, device, torch.float64).detached()
    if sample.hiddens[0].numel() * len(sample.hiddens) > 3000:
        sample = AggregateSample(name, [x[:1] for x in sample.hiddens], sample.weights[:1]).detached()
    if name == "expanded":  # gradcheck takes no input whose entries overlap
        contiguous = [x.detach().contiguous() for x in sample.hiddens]
        sample = AggregateSample(name, contiguous, sample.weights.detach().contiguous()).detached()
    leaves = unique(sample.hiddens)
    index = [next(i for i, leaf in enumerate(leaves) if leaf is x) for x in sample.hiddens]

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        hiddens = [args[i] for i in index]
        if not chained:
            return tuple(ops.depth_aggregate(hiddens, args[-1]))
        streams, handed_on = ops.depth_aggregate_chained(hiddens, args[-1])
        return (*streams, *handed_on)

    # nondet_tol is 0: the backward must be repeatable bit for bit.
    assert torch.autograd.gradcheck(run, (*leaves, sample.weights), fast_mode=sample.hiddens[0].numel() > 64)


def test_opcheck(name: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = find(name, device, dtype)
        hiddens = [x.detach().clone().requires_grad_() for x in sample.hiddens]
        weights = sample.weights.detach().clone().requires_grad_()
        torch.library.opcheck(torch.ops.muddformer.depth_aggregate, (hiddens, weights))
        plain = [x.detach() for x in hiddens]
        grads = [torch.randn_like(plain[0]) for _ in range(weights.shape[-2])]
        for incoming in ([], [None] * len(plain), [torch.randn_like(x) for x in plain]):
            torch.library.opcheck(
                torch.ops.muddformer.depth_aggregate_backward,
                ([None, *grads[1:]], incoming, plain, weights.detach()),
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_history_larger_than_the_caches(device: torch.device, dtype: torch.dtype) -> None:
    """On the CPU the gradients of such a history are written past the caches."""
    make = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    ours = AggregateSample("", [make(300, 512) for _ in range(30)], make(300, 4, 30)).detached()
    wide = ours.detached(torch.float64)
    grads = [make(300, 512) for _ in range(4)]
    torch.autograd.backward(ops.depth_aggregate(ours.hiddens, ours.weights), grads)
    torch.autograd.backward(reference.depth_aggregate(wide.hiddens, wide.weights), [g.double() for g in grads])
    for a, b in zip([*ours.hiddens, ours.weights], [*wide.hiddens, wide.weights], strict=True):
        assert relative_error(a.grad, b.grad) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sources", [2, 13, 33])
def test_error_is_at_most_twice_that_of_eager(device: torch.device, dtype: torch.dtype, sources: int) -> None:
    """Against float64; three times for the gradients."""
    hiddens = [torch.randn(64, 128, device=device).to(dtype) for _ in range(sources)]
    weights = torch.randn(64, 4, sources, device=device).to(dtype)
    grads = [torch.randn(64, 128, device=device).to(dtype) for _ in range(4)]

    def run(function, cast: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        xs = [x.to(cast).detach().requires_grad_() for x in hiddens]
        w = weights.to(cast).detach().requires_grad_()
        ys = function(xs, w)
        torch.autograd.backward(ys, [g.to(cast) for g in grads])
        return ys, [*(x.grad for x in xs), w.grad]

    exact, exact_grads = run(reference.depth_aggregate, torch.float64)
    eager, eager_grads = run(reference.depth_aggregate, dtype)
    ours, our_grads = run(ops.depth_aggregate, dtype)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 1e-7
    for a, b, c in zip(our_grads, eager_grads, exact_grads, strict=True):
        assert relative_error(a, c) <= 3 * relative_error(b, c) + 1e-7


def test_repeatable_bit_for_bit(device: torch.device) -> None:
    sample = find("tokens(7,)-D256-S25-C4", device, torch.float32)

    def run() -> list[Tensor]:
        leaves = sample.detached()
        ys = ops.depth_aggregate(leaves.hiddens, leaves.weights)
        torch.autograd.backward(ys, [torch.full_like(y, 0.7) for y in ys])
        return [*ys, leaves.weights.grad, *(x.grad for x in leaves.hiddens)]

    first = run()
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    torch.set_num_threads(threads)


def test_inputs_are_not_changed_and_outputs_are_new(device: torch.device) -> None:
    sample = find("sliced-width", device, torch.float32)
    before = [x.clone() for x in sample.hiddens], sample.weights.clone()
    outputs = ops.depth_aggregate(sample.hiddens, sample.weights)
    assert all(torch.equal(a, b) for a, b in zip(before[0], sample.hiddens, strict=True))
    assert torch.equal(before[1], sample.weights)
    storages = {x.untyped_storage().data_ptr() for x in sample.hiddens}
    assert not storages & {y.untyped_storage().data_ptr() for y in outputs}


def test_results_on_a_cpu_take_the_memory_of_freed_ones() -> None:
    hiddens, weights = [torch.randn(64, 1024) for _ in range(2)], torch.randn(64, 4, 2)
    addresses = lambda outputs: {y.data_ptr() for y in outputs}  # noqa: E731
    first = ops.depth_aggregate(hiddens, weights)
    second = ops.depth_aggregate([-x for x in hiddens], weights)
    assert not addresses(first) & addresses(second)
    assert all(torch.equal(a, -b) for a, b in zip(first, second, strict=True))
    freed = addresses(second)
    del second
    third = ops.depth_aggregate(hiddens, weights)
    assert addresses(third) == freed
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    third[0].resize_(256, 1024)[:64].copy_(first[0])


def test_double_backward_names_the_op(device: torch.device) -> None:
    leaves = find("tokens(4,)-D64-S5-C3", device, torch.float64).detached()
    ys = ops.depth_aggregate(leaves.hiddens, leaves.weights)
    (grad,) = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves.weights, create_graph=True)
    with pytest.raises(RuntimeError, match="depth_aggregate_backward"):
        grad.sum().backward()


def test_autocast_keeps_the_history_in_the_autocast_dtype(device: torch.device) -> None:
    leaves = find("tokens(4,)-D64-S5-C3", device, torch.float32).detached()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        streams, handed_on = ops.depth_aggregate_chained(leaves.hiddens, leaves.weights)
        again, _ = ops.depth_aggregate_chained(handed_on, leaves.weights)
        plain = ops.depth_aggregate(leaves.hiddens, leaves.weights)
    assert {t.dtype for t in [*streams, *handed_on, *again, *plain]} == {torch.bfloat16}
    sum(s.float().sum() for s in [*streams, *again]).backward()
    assert leaves.hiddens[0].grad.dtype == leaves.weights.grad.dtype == torch.float32


def test_inference_mode_and_no_grad(device: torch.device) -> None:
    sample = find("tokens(4,)-D64-S5-C3", device, torch.float32)
    expected = reference.depth_aggregate(sample.hiddens, sample.weights)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            streams, _ = ops.depth_aggregate_chained(sample.hiddens, sample.weights)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(streams, expected, strict=True))


def test_meta() -> None:
    hiddens = [torch.empty(2, 3, 16, device="meta") for _ in range(5)]
    outputs = ops.depth_aggregate(hiddens, torch.empty(2, 3, 4, 5, device="meta"))
    assert [y.shape for y in outputs] == [(2, 3, 16)] * 4
    assert all(y.is_meta for y in outputs)


@pytest.mark.compile
def test_compile_fullgraph_without_recompiling(device: torch.device) -> None:
    """One graph for any number of tokens, with gradients equal to eager's."""
    torch._dynamo.reset()

    def run(hiddens: list[Tensor], weights: Tensor) -> Tensor:
        streams, handed_on = ops.depth_aggregate_chained(hiddens, weights)
        streams, handed_on = ops.depth_aggregate_chained([*handed_on[1:], streams[0].relu()], weights)
        return sum(s.square().mean() for s in [*streams, *handed_on])

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (6, 9, 17):
        leaves = AggregateSample(
            "", [torch.randn(tokens, 24, device=device) for _ in range(3)], torch.randn(tokens, 4, 3, device=device)
        )
        eager, ours = leaves.detached(), leaves.detached()
        run(eager.hiddens, eager.weights).backward()
        with torch._dynamo.config.patch(error_on_recompile=tokens != 6):
            compiled(ours.hiddens, ours.weights).backward()
        for a, b in zip([*ours.hiddens, ours.weights], [*eager.hiddens, eager.weights], strict=True):
            assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.compile
def test_export(device: torch.device) -> None:
    class Layer(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
            streams, handed_on = ops.depth_aggregate_chained([a, b], weights)
            return torch.stack([*streams, *handed_on])

    tokens = torch.export.Dim("tokens", min=2, max=64)
    args = tuple(torch.randn(4, *shape, device=device) for shape in [(8,), (8,), (4, 2)])
    program = torch.export.export(
        Layer(), args, dynamic_shapes={"a": {0: tokens}, "b": {0: tokens}, "weights": {0: tokens}}
    )
    args = tuple(torch.randn(9, *shape, device=device) for shape in [(8,), (8,), (4, 2)])
    assert relative_error(program.module()(*args), Layer()(*args)) < 1e-6
    assert "muddformer.depth_aggregate" in str(program.graph)
