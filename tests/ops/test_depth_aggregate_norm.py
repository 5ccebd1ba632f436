"""depth_aggregate_norm_chained, its forward and its backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from helpers.op_samples import DTYPES, relative_error, tolerance
from muddformer import ops, reference
from muddformer.nn import DepthAggregation, RMSNorm


@dataclass
class Case:
    """Arguments of one call. ``norms`` holds the norms' parameters by name."""

    hiddens: list[Tensor]
    weights: Tensor
    norms: dict[str, Tensor]
    norm: str
    add_newest: bool
    eps: float = 1e-5

    def tensors(self) -> list[Tensor]:
        return [*self.hiddens, self.weights, *self.norms.values()]

    def with_tensors(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> Case:
        sources = len(self.hiddens)
        norms = dict(zip(self.norms, tensors[sources + 1 :], strict=True))
        return Case(list(tensors[:sources]), tensors[sources], norms, self.norm, self.add_newest, self.eps)

    def leaves(self, dtype: torch.dtype | None = None) -> Case:
        return self.with_tensors([t.detach().to(dtype or t.dtype).requires_grad_() for t in self.tensors()])

    def arguments(self) -> tuple[Any, ...]:
        ways = range(self.weights.shape[-2])
        weights, biases = ([self.norms.get(f"{kind}{c}") for c in ways] for kind in ("weight", "bias"))
        return self.hiddens, self.weights, weights, biases

    def options(self) -> dict[str, Any]:
        return {
            "norm": self.norm,
            "eps": self.eps,
            "add_newest": self.add_newest,
            "pre_weight": self.norms.get("pre"),
            "post_weight": self.norms.get("post"),
        }

    def ours(self) -> tuple[list[Tensor], list[Tensor]]:
        return ops.depth_aggregate_norm_chained(*self.arguments(), **self.options())

    def naive(self) -> tuple[list[Tensor], list[Tensor]]:
        return reference.depth_aggregate_norm(*self.arguments(), **self.options())

    def private(self) -> tuple[Any, ...]:
        return *self.arguments(), *self.options().values()


FORMS = [
    f"{norm}-{parts}-{shape}"
    for norm in ("rms", "layer")
    for parts in ("norms", "add", "add-post", "post-alone", "pre", "pre-add", "pre-add-post", "narrow")
    for shape in ("3x16-S3-C4", "2x3x40-S5-C2", "5x257-S2-C1", "4x24-S9-C5", "33x2560-S4-C4", "0x16-S2-C3")
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def make_case(form: str, device: torch.device, dtype: torch.dtype) -> Case:
    norm, *parts, size, sources, ways = form.split("-")
    parts = "-".join(parts)
    *leading, width = (int(n) for n in size.split("x"))
    sources, ways = int(sources[1:]), int(ways[1:])

    def make(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.float64).to(to)

    parameter = dtype if parts == "narrow" or dtype == torch.float64 else torch.float32
    norms = {}
    post = "post" in parts
    for c in range(ways):
        if c >= max(1, ways - 1) or parts == "post-alone" or (post and c == ways - 1):
            continue
        norms[f"weight{c}"] = 1 + make(width, to=parameter) / 4
        if parts == "narrow":
            norms[f"weight{c}"][::5] = 0  # too small to divide by
        if norm == "layer" and c != 1:
            norms[f"bias{c}"] = make(width, to=parameter) / 2
    if "pre" in parts:
        norms["pre"] = 1 + make(width, to=parameter) / 4
    if post:
        norms["post"] = make(width, to=parameter) / 8
    hiddens = [make(*leading, width) for _ in range(sources)]
    return Case(hiddens, make(*leading, ways, sources), norms, norm, "add" in parts or post)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(form: str, device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(form, device, dtype)
    ours, wide, eager = case.leaves(), case.leaves(torch.float64), case.leaves()
    outputs, handed_on = ours.ours()
    outputs += handed_on
    expected, same_dtype = ([*streams, *mixed] for streams, mixed in (wide.naive(), eager.naive()))
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    torch.autograd.backward(same_dtype, grads)
    for y, z, e in zip(outputs, expected, same_dtype, strict=True):
        assert y.dtype == dtype
        assert relative_error(y, z) <= max(2 * relative_error(e, z), tolerance(dtype))
    for a, b, e in zip(ours.tensors(), wide.tensors(), eager.tensors(), strict=True):
        assert a.grad.dtype == a.dtype
        assert relative_error(a.grad, b.grad) <= max(3 * relative_error(e.grad, b.grad), 4 * tolerance(dtype))


@pytest.mark.parametrize("parts", ["norms", "add", "add-post", "pre", "pre-add-post", "narrow"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("shape", ["2x6-S3-C3", "3x8-S2-C1"])
def test_gradcheck(norm: str, parts: str, shape: str, device: torch.device) -> None:
    case = make_case(f"{norm}-{parts}-{shape}", device, torch.float64).leaves()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        streams, handed_on = case.with_tensors(tensors).ours()
        return *streams, *handed_on

    assert torch.autograd.gradcheck(run, tuple(case.tensors()))


def test_opcheck(form: str, device: torch.device) -> None:
    case = make_case(form, device, torch.float32)
    if case.hiddens[-1].dim() == 3:
        case.hiddens[-1] = case.hiddens[-1].transpose(0, 1).contiguous().transpose(0, 1)
    forward = torch.ops.muddformer.depth_aggregate_norm_forward.default
    opcheck(forward, case.private(), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    outputs, _, mix, statistics = forward(*case.private())
    grads = [torch.randn_like(y) for y in outputs]
    grads[0] = None if len(grads) > 1 else grads[0]
    incoming = [None, *(torch.randn_like(x) for x in case.hiddens[1:])]
    opcheck(
        torch.ops.muddformer.depth_aggregate_norm_backward.default,
        (grads, incoming, *case.private(), outputs, mix, statistics),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("parts", ["add-post", "pre-add-post"])
def test_undefined_gradients(parts: str, device: torch.device) -> None:
    case = make_case(f"rms-{parts}-3x16-S3-C4", device, torch.float64)
    for streams_used in ([1], []):
        ours, naive = case.leaves(), case.leaves()
        for one in (ours, naive):
            streams, handed_on = one.ours() if one is ours else one.naive()
            sum(y.square().sum() for y in [handed_on[2], *(streams[c] for c in streams_used)]).backward()
        for a, b in zip(ours.tensors(), naive.tensors(), strict=True):
            if b.grad is not None:
                assert relative_error(a.grad, b.grad) < tolerance(torch.float64)
    only = case.leaves()
    sum(x.sum() for x in only.ours()[1][:2]).backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in only.hiddens[:2])


@pytest.mark.compile
def test_compiles_without_a_break_or_recompiling(device: torch.device) -> None:
    def step(case: Case) -> Tensor:
        streams, handed_on = case.ours()
        return sum(y.float().square().mean() for y in [*streams, *handed_on])

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (6, 10, 14):
        case = make_case(f"layer-pre-add-post-{tokens}x16-S3-C4", device, torch.float32)
        ours, eager = case.leaves(), case.leaves()
        with torch._dynamo.config.patch(error_on_recompile=tokens > 6):
            compiled(ours).backward()
        step(eager).backward()
        for a, b in zip(ours.tensors(), eager.tensors(), strict=True):
            assert relative_error(a.grad, b.grad) < 1e-5


def test_autocast(device: torch.device) -> None:
    case = make_case("rms-pre-add-post-6x16-S3-C4", device, torch.float32).leaves()
    with torch.autocast(device.type, torch.bfloat16):
        streams, handed_on = case.ours()
    assert all(y.dtype == torch.bfloat16 for y in [*streams, *handed_on])
    sum(y.float().sum() for y in streams).backward()
    assert all(t.grad.dtype == torch.float32 for t in case.tensors())


@pytest.mark.parametrize("post_norm", ["none", "residual", "all"])
@pytest.mark.parametrize("kind", [RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("ways", ["qkvr", "kr", "qv", 2])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_layer_norms_its_streams(
    device: torch.device, post_norm: str, kind: type, ways: str | int, pre_norm: bool
) -> None:
    """DepthAggregation with stream norms, fused on CUDA, computes what the norms after it would."""
    da = DepthAggregation(32, 3, ways, post_norm=post_norm, pre_norm=pre_norm, eps=1e-5).to(device)
    count = ways if isinstance(ways, int) else 4
    norms = [None if i == count - 1 else kind(32, 1e-5).to(device) for i in range(count)]
    for parameter in itertools.chain(da.parameters(), *(norm.parameters() for norm in norms if norm is not None)):
        nn.init.normal_(parameter, 0.5, 0.2)
    hiddens = [torch.randn(2, 5, 32, device=device, requires_grad=True) for _ in range(3)]
    inputs = [*hiddens, *da.parameters(), *(p for norm in norms if norm is not None for p in norm.parameters())]
    results = []
    for fused in (True, False):
        streams, handed_on = da(hiddens, stream_norms=norms if fused else None)
        if not fused:
            streams = [y if norm is None else norm(y) for norm, y in zip(norms, streams, strict=True)]
        weight = torch.linspace(-1, 1, streams[0].numel(), device=device).view_as(streams[0])
        loss = sum((y * weight).sum() * (c + 1) for c, y in enumerate([*streams, *handed_on]))
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        results.append([*streams, *handed_on, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    return {
        "norm": ({"norm": "batch"}, ValueError, "norm: expected"),
        "eps": ({"eps": -1.0}, ValueError, "eps: expected"),
        "few norm weights": ({"norm_weights": [None]}, ValueError, "norm_weights: expected C = 3"),
        "few biases": ({"norm_biases": [None]}, ValueError, "norm_biases: expected C = 3"),
        "shape": ({"norm_weights": [torch.ones(7), None, None]}, ValueError, r"norm_weights\[0\]: expected shape"),
        "dtype": (
            {"norm_weights": [torch.ones(8).half(), None, None]},
            TypeError,
            r"norm_weights\[0\]: expected dtype",
        ),
        "mixed": (
            {"norm_weights": [torch.ones(8), torch.ones(8).double(), None]},
            TypeError,
            r"norm_weights\[1\]: expected dtype",
        ),
        "bias alone": ({"norm_biases": [None, torch.ones(8), None]}, ValueError, r"norm_biases\[1\]: expected None"),
        "bias of rms": (
            {"norm_weights": [torch.ones(8), None, None], "norm_biases": [torch.ones(8), None, None], "norm": "rms"},
            ValueError,
            r"norm_biases\[0\]: expected None for the norm 'rms'",
        ),
        "pre": ({"pre_weight": torch.ones(7)}, ValueError, "pre_weight: expected shape"),
        "pre dtype": ({"pre_weight": torch.ones(8).double()}, TypeError, "pre_weight: expected dtype"),
        "post without add": ({"post_weight": torch.ones(8)}, ValueError, "post_weight: expected None"),
        "post with norm": (
            {"add_newest": True, "post_weight": torch.ones(8), "norm_weights": [None, None, torch.ones(8)]},
            ValueError,
            r"norm_weights\[2\]: expected None",
        ),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_arguments(name: str) -> None:
    changes, error, message = bad_calls()[name]
    arguments = {"norm_weights": [None] * 3, "norm_biases": None, **changes}
    with pytest.raises(error, match=message):
        ops.depth_aggregate_norm_chained([torch.randn(2, 8) for _ in range(2)], torch.randn(2, 3, 2), **arguments)


@pytest.mark.parametrize("name", ["outputs", "output", "mix", "statistics"])
def test_backward_checks_what_the_forward_returned(name: str) -> None:
    case = make_case("rms-add-post-3x16-S3-C4", torch.device("cpu"), torch.float32)
    outputs, _, mix, statistics = torch.ops.muddformer.depth_aggregate_norm_forward(*case.private())
    bad = {"outputs": outputs, "mix": mix, "statistics": statistics}
    bad |= {
        "outputs": {"outputs": outputs[1:]},
        "output": {"outputs": [outputs[0][:1], *outputs[1:]]},
        "mix": {"mix": mix[:1]},
        "statistics": {"statistics": statistics[:, :2]},
    }[name]
    with pytest.raises(ValueError, match=f"^{name}"):
        torch.ops.muddformer.depth_aggregate_norm_backward(
            [torch.ones_like(y) for y in outputs], [], *case.private(), *bad.values()
        )


def test_norms_as_one_object() -> None:
    case = make_case("layer-add-3x16-S3-C4", torch.device("cpu"), torch.float32)
    hiddens, weights, norm_weights, norm_biases = case.arguments()
    options = case.options()
    norms = ops.StreamNorms(norm_weights, norm_biases, options.pop("norm"), **options)
    expected, _ = case.ours()
    streams, _ = ops.depth_aggregate_norm_chained(hiddens, weights, norms)
    for y, z in zip(streams, expected, strict=True):
        assert torch.equal(y, z)


def fast_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float16, "sources": 64, "ways": 4, "width": 4096}, True),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.int32}, False),
        ({"width": 60}, False),
        ({"dtype": torch.float32, "width": 60}, False),  # autocast may make it one of 16 bits
        ({"width": 1 << 20}, False),
        ({"sources": 65}, False),
        ({"ways": 5}, False),
        ({"sources": 1 << 40}, False),
    ],
    ids=str,
)
def test_fuses_norms(changes: dict[str, Any], fits: bool, device: torch.device) -> None:
    case = {"dtype": torch.bfloat16, "width": 64, "sources": 5, "ways": 3, **changes}
    x = torch.empty(2, case["width"], dtype=case["dtype"], device=device)
    expected = fits and fast_gpu(device)
    assert ops.fuses_norms(x, case["sources"], case["ways"]) is expected
    assert ops.fuses_norms(x.to("meta"), case["sources"], case["ways"]) is False
    with FakeTensorMode() as mode:
        assert ops.fuses_norms(mode.from_tensor(x), case["sources"], case["ways"]) is expected


def test_fuses_norms_of_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 64, dtype=torch.bfloat16, device="cuda:7")
        assert ops.fuses_norms(x, 5, 3) in (False, torch.cuda.device_count() > 7)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fuses_norms_is_a_constant_when_compiling(dynamic: bool, device: torch.device) -> None:
    def branch(x: Tensor) -> Tensor:
        return x + 1 if ops.fuses_norms(x, 5, 3) else x - 1

    torch._dynamo.reset()
    compiled = torch.compile(branch, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for dtype in (torch.bfloat16, torch.float64):
        for tokens in (2, 3):
            x = torch.zeros(tokens, 64, dtype=dtype, device=device)
            assert torch.equal(compiled(x), branch(x))
