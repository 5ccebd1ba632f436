"""linear_cross_entropy and the operator that it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from helpers.op_samples import DTYPES, CrossEntropySample, cross_entropy_samples, relative_error, tolerance
from muddformer import ops, reference

NAMES = [sample.name for sample in cross_entropy_samples(torch.device("cpu"), torch.float32)]


def find(name: str, device: torch.device, dtype: torch.dtype) -> CrossEntropySample:
    return next(sample for sample in cross_entropy_samples(device, dtype) if sample.name == name)


def run(function, sample: CrossEntropySample) -> Tensor:
    return function(sample.hidden, sample.weight, sample.targets, sample.bias, **sample.options)


def loss_and_gradients(function, sample: CrossEntropySample, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss and all gradients, of losses that weigh differently where there are several."""
    leaves = sample.detached(dtype)
    loss = run(function, leaves)
    weights = torch.linspace(-1, 2, max(loss.numel(), 1), device=loss.device, dtype=loss.dtype)[: loss.numel()]
    (loss * weights.view(loss.shape) if loss.dim() else 3 * loss).sum().backward()
    return [loss, *(t.grad for t in leaves.tensors())]


def check(sample: CrossEntropySample, dtype: torch.dtype) -> None:
    """As near to float64 as PyTorch's steps are, but for a factor of two."""
    ours = loss_and_gradients(ops.linear_cross_entropy, sample)
    wide = loss_and_gradients(reference.linear_cross_entropy, sample, torch.float64)
    if sample.name == "float32-head":
        return check_gradients(sample, ours, wide)
    naive = loss_and_gradients(reference.linear_cross_entropy, sample)
    for i, (a, b, w) in enumerate(zip(ours, naive, wide, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, w) <= max(2 * relative_error(b, w), tolerance(dtype)), i
    return None


def check_gradients(sample: CrossEntropySample, ours: list[Tensor], wide: list[Tensor]) -> None:
    """A float32 head beside 16 bits has float32 gradients."""
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in sample.tensors()]
    for a, w in zip(ours, wide, strict=True):
        assert relative_error(a, w) < tolerance(sample.hidden.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    check(find(name, device, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_head(device: torch.device, dtype: torch.dtype) -> None:
    check(find("float32-head", device, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [8191, 50257, 130001])
def test_many_classes(classes: int, device: torch.device, dtype: torch.dtype) -> None:
    """Rows that a block of the kernel keeps in shared memory, and longer ones; a chunk does not divide the tokens."""
    tokens, chunk = (300, 128) if device.type == "cuda" else (48, 40)
    hidden, weight = torch.randn(tokens, 64, device=device).to(dtype), torch.randn(classes, 64, device=device).to(dtype)
    targets = torch.randint(classes, (tokens,), device=device)
    targets[7], targets[8:20] = classes - 1, -100
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "chunk": chunk}
    check(CrossEntropySample("many", hidden, weight / 8, targets, None, options), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(device: torch.device, dtype: torch.dtype) -> None:
    """Classes that are ruled out by -infinity, and logits whose exponentials overflow."""
    hidden = torch.ones(3, 8, device=device, dtype=dtype)
    weight = torch.zeros(24, 8, device=device, dtype=dtype)
    weight[3], weight[4] = 30.0, 29.0
    bias = torch.zeros(24, device=device, dtype=dtype)
    bias[16:] = -torch.inf
    bias[:2] = -torch.inf
    targets = torch.tensor([3, 4, 5], device=device)
    sample = CrossEntropySample("extreme", hidden, weight, targets, bias)
    for a, w in zip(
        loss_and_gradients(ops.linear_cross_entropy, sample),
        loss_and_gradients(reference.linear_cross_entropy, sample, torch.float64),
        strict=True,
    ):
        assert a.isfinite().all()
        assert relative_error(a, w) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=str)
def test_what_is_no_number_stays_with_its_token(broken: float, device: torch.device, dtype: torch.dtype) -> None:
    def losses_and_gradient(hidden: Tensor) -> tuple[Tensor, Tensor]:
        sample.hidden = hidden.requires_grad_()
        losses = run(ops.linear_cross_entropy, sample).flatten()
        return losses, torch.autograd.grad(losses.sum(), hidden)[0].flatten(0, 1)

    sample = find("none", device, dtype).detached()
    hidden = sample.hidden.detach().clone()
    expected = losses_and_gradient(hidden.clone())
    hidden[0, 1, 0] = broken
    losses, grad = losses_and_gradient(hidden)
    others = torch.arange(len(losses), device=device) != 1
    assert not losses[1].isfinite() and not grad[1].isfinite().any()
    for ours, whole in zip((losses, grad), expected, strict=True):
        torch.testing.assert_close(ours[others], whole[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.3, 1.0])
def test_smoothing_of_logits_with_an_offset(smoothing: float, device: torch.device, dtype: torch.dtype) -> None:
    """An offset of all logits changes nothing."""
    sample = find("plain", device, dtype)
    sample.options["label_smoothing"] = smoothing
    sample.bias = torch.full_like(sample.weight[:, 0], 1000.0)
    check(sample, dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classes_that_are_ruled_out(smoothing: float, device: torch.device) -> None:
    """Smoothing gives them a part of the target's probability: the loss is infinite then, as PyTorch's is."""
    sample = find("plain", device, torch.float32)
    sample.options["label_smoothing"] = smoothing
    sample.bias = torch.zeros_like(sample.weight[:, 0])
    sample.bias[next(i for i in range(40) if i not in sample.targets.flatten().tolist())] = -torch.inf
    loss = run(ops.linear_cross_entropy, sample)
    torch.testing.assert_close(loss, run(reference.linear_cross_entropy, sample))
    assert loss.isinf() if smoothing else loss.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets_have_no_part(reduction: str, device: torch.device) -> None:
    """As if those tokens were not there, whatever their hidden states are."""
    sample = find("chunks", device, torch.float64).detached()
    few = sample.targets.clone()
    few[1] = -100
    ours = ops.linear_cross_entropy(sample.hidden, sample.weight, few, reduction=reduction, chunk=4)
    kept = [i for i in range(3) if i != 1]
    expected = ops.linear_cross_entropy(sample.hidden[kept], sample.weight, sample.targets[kept], reduction=reduction)
    if reduction == "none":
        assert not ours[1].any()
        ours, expected = ours[kept].square().sum(), expected.square().sum()
    a = torch.autograd.grad(ours, [sample.hidden, sample.weight])
    b = torch.autograd.grad(expected, [sample.hidden, sample.weight])
    for x, y in zip((ours, *a), (expected, *b), strict=True):
        torch.testing.assert_close(x, y)
    assert not a[0][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    sample = find("everything", device, dtype)
    first, second = (loss_and_gradients(ops.linear_cross_entropy, sample) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs(frozen: tuple[int, ...], reduction: str, device: torch.device) -> None:
    """Gradients that nothing needs are not made; the others are the same."""
    leaves = find("everything", device, torch.float64).detached()
    leaves.options["reduction"] = reduction
    wanted = [t for i, t in enumerate(leaves.tensors()) if i not in frozen]
    expected = torch.autograd.grad(run(ops.linear_cross_entropy, leaves).sum(), wanted)
    for i in frozen:
        leaves.tensors()[i].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        actual = torch.autograd.grad(run(ops.linear_cross_entropy, leaves).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    product = 2 * leaves.hidden.numel() * leaves.weight.shape[0]
    again = reduction == "none"
    assert counter.get_total_flops() == product * (1 + again + sum(i not in frozen for i in (0, 1)))


def test_without_gradients(device: torch.device) -> None:
    sample = find("everything", device, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = run(ops.linear_cross_entropy, sample.detached())
    assert counter.get_total_flops() == 2 * sample.hidden.numel() * sample.weight.shape[0]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, run(reference.linear_cross_entropy, sample))


def test_gradcheck(device: torch.device) -> None:
    for name in ("sum", "none", "everything"):
        leaves = find(name, device, torch.float64).detached()
        assert torch.autograd.gradcheck(
            lambda *t, leaves=leaves: ops.linear_cross_entropy(t[0], t[1], leaves.targets, t[2], **leaves.options),
            leaves.tensors(),
            fast_mode=True,
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction: str, device: torch.device) -> None:
    leaves = find("plain", device, torch.float64).detached()
    loss = ops.linear_cross_entropy(leaves.hidden, leaves.weight, leaves.targets, reduction=reduction).sum()
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy: .* second derivatives"):
        torch.autograd.grad(loss, leaves.hidden, create_graph=True)


def test_backward_twice(device: torch.device) -> None:
    """What is kept is not changed by a backward."""
    leaves = find("plain", device, torch.float32).detached()
    loss = run(ops.linear_cross_entropy, leaves)
    first = torch.autograd.grad(loss * 5, leaves.tensors(), retain_graph=True)
    second = torch.autograd.grad(loss * 5, leaves.tensors())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["everything", "none", "no-tokens", "strided"])
def test_opcheck(name: str, device: torch.device) -> None:
    sample = find(name, device, torch.float32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    o = sample.options
    options = (o.get("ignore_index", -100), o.get("label_smoothing", 0.0), o.get("z_loss", 0.0), o.get("chunk"))
    leaves = sample.detached()
    arguments = (leaves.hidden, leaves.weight, leaves.targets, leaves.bias)
    opcheck(
        torch.ops.muddformer.linear_cross_entropy.default,
        (*arguments, o.get("reduction", "mean"), *options),
        test_utils=utils,
    )
    detached = [t if t is None else t.detach() for t in arguments]
    grads = torch.randn(sample.targets.shape, device=device)
    wanted = [True, True, sample.bias is not None]
    losses = torch.ops.muddformer.linear_cross_entropy_losses.default
    opcheck(losses, (*detached, grads, *options, wanted), test_utils=utils)
    opcheck(losses, (*detached, None, *options, [False, True, False]), test_utils=utils)


@pytest.mark.parametrize("head", [torch.float32, torch.float16], ids=str)
def test_autocast(head: torch.dtype, device: torch.device) -> None:
    """The head's products are in the autocast dtype, its gradient in its own; float32 is never rounded in between."""
    sample = find("chunks", device, torch.float32)
    sample.weight = sample.weight.to(head)
    leaves = sample.detached()
    with torch.autocast(device.type, torch.bfloat16):
        loss = run(ops.linear_cross_entropy, leaves)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [t.grad.dtype for t in leaves.tensors()] == [torch.float32, head]
    wide = loss_and_gradients(reference.linear_cross_entropy, sample, torch.float64)
    for a, w in zip([loss, *(3 * t.grad for t in leaves.tensors())], wide, strict=True):
        assert relative_error(a, w) < tolerance(torch.bfloat16)
    if head == torch.float32:
        assert not torch.equal(leaves.weight.grad, leaves.weight.grad.bfloat16().float())


@pytest.mark.compile
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break_or_recompiling(reduction: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        each = ops.linear_cross_entropy(hidden.tanh(), weight, targets, reduction=reduction, z_loss=1e-3, chunk=4)
        return each.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 10, 14):
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((tokens, 16), (40, 16))]
        targets = torch.randint(40, (tokens,), device=device)
        expected = torch.autograd.grad(loss(*leaves, targets), leaves)
        with torch._dynamo.config.patch(error_on_recompile=tokens > 6):
            actual = torch.autograd.grad(compiled(*leaves, targets), leaves)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("target", [-1, 40, -101])
def test_a_target_that_is_no_class(target: int) -> None:
    hidden, weight, targets = torch.randn(3, 8), torch.randn(40, 8), torch.tensor([0, target, -100])
    with pytest.raises(IndexError, match=rf"targets: expected classes from 0 to V - 1 = 39, .* got {target}"):
        ops.linear_cross_entropy(hidden, weight, targets)


@pytest.mark.cuda
def test_memory() -> None:
    """No logits of all tokens: gradients, the head in 16 bits, and the logits of a chunk."""
    tokens, width, classes, chunk = 8192, 256, 32000, 1024
    hidden = torch.randn(tokens, width, device="cuda", requires_grad=True)
    weight = torch.randn(classes, width, device="cuda", requires_grad=True)
    targets = torch.randint(classes, (tokens,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        ops.linear_cross_entropy(hidden, weight, targets, chunk=chunk).backward()
    peak = torch.cuda.max_memory_allocated() - before
    kept = 4 * (hidden.numel() + weight.numel())
    assert peak < 2 * kept + 2 * weight.numel() + 2 * chunk * classes + (40 << 20)
    assert peak < 2 * tokens * classes
