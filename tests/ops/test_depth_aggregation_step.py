"""depth_aggregation_step: a whole layer of connections for decoding, against the naive composition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers.op_samples import DTYPES, relative_error, tolerance
from muddformer import ops, reference


def arguments(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    leading: tuple[int, ...] = (2, 1),
    width: int = 64,
    sources: int = 5,
    ways: int = 4,
    hidden: int | None = 20,
    norm: str = "none",
    wide: bool = False,
    scale: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of the op; the last stream stays without a norm. ``wide``: float32 parameters."""

    def make(*shape: int, parameter: bool = False) -> Tensor:
        values = torch.randn(shape, device=device, dtype=torch.float64)
        return values.to(torch.float32 if parameter and wide else dtype)

    normed = [norm != "none" and (c < ways - 1 or ways == 1) for c in range(ways)]
    return {
        "hiddens": [make(*leading, width) for _ in range(sources)],
        "w1": None if hidden is None else make(hidden, width) / width**0.5,
        "w2": None if hidden is None else make(ways * sources, hidden) / hidden**0.5,
        "prior": make(ways, sources, parameter=True),
        "scale": make(width, parameter=True) if scale else None,
        "norm_weights": [make(width, parameter=True) if on else None for on in normed],
        "norm_biases": [make(width, parameter=True) if on else None for on in normed] if norm == "layer" else [],
        "norm": norm,
        **options,
    }


def convert(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every tensor of an argument."""
    if isinstance(value, Tensor):
        return function(value)
    return [convert(v, function) for v in value] if isinstance(value, list) else value


def wide_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: convert(value, Tensor.double) for name, value in kwargs.items()}


def naive(
    hiddens: list[Tensor],
    w1: Tensor | None,
    w2: Tensor | None,
    prior: Tensor,
    *,
    norm_weights: list[Tensor | None] = (),
    norm_biases: list[Tensor | None] = (),
    norm: str = "none",
    norm_eps: float = 1e-6,
    cap: float | None = None,
    **options: Any,
) -> list[Tensor]:
    """The layer in plain PyTorch."""
    x = hiddens[-1]
    if w1 is None:
        a = prior.to(x.dtype) if cap is None else cap * torch.tanh(prior.to(x.dtype) / cap)
        weights = a.expand(*x.shape[:-1], *prior.shape)
    else:
        weights = reference.connection_weights(x, w1, w2, prior, cap=cap, **options)
    streams = reference.depth_aggregate(hiddens, weights)
    pairs = itertools.zip_longest(streams, norm_weights, norm_biases)
    shape = x.shape[-1:]
    return [
        y
        if weight is None
        else F.layer_norm(y, shape, weight.to(y.dtype), None if bias is None else bias.to(y.dtype), norm_eps)
        if norm == "layer"
        else F.rms_norm(y, shape, weight.to(y.dtype), norm_eps)
        for y, weight, bias in pairs
    ]


def positional(kwargs: dict[str, Any]) -> tuple:
    """Arguments in the order of the schema."""
    defaults = {"eps": 1e-6, "gelu_approximate": "none", "cap": None, "norm_eps": 1e-6}
    names = "hiddens w1 w2 prior scale eps gelu_approximate cap norm_weights norm_biases norm norm_eps"
    return tuple({**defaults, **kwargs}[name] for name in names.split())


VARIANTS = [
    {},
    {"norm": "rms", "norm_eps": 1e-3},
    {"norm": "layer", "norm_eps": 1e-3},
    {"hidden": None, "cap": 2.0, "norm": "rms"},
    {"hidden": None, "leading": (3,), "norm": "layer", "ways": 1},
    {"scale": True, "eps": 1e-2, "gelu_approximate": "tanh", "cap": 1.5, "norm": "rms"},
    {"leading": (), "ways": 1, "sources": 13, "hidden": 64},
    {"leading": (9,), "ways": 3, "sources": 1},
    {"leading": (33,), "width": 256, "sources": 25, "hidden": 128, "norm": "rms"},
    {"leading": (1, 1), "width": 2560, "sources": 33, "hidden": 192, "norm": "layer"},
    # Composed on every device: too many tokens, odd widths, many ways.
    {"leading": (3, 40), "norm": "rms"},
    {"width": 33, "norm": "layer"},
    {"hidden": 7},
    {"ways": 9, "sources": 2},
    {"leading": (0,), "norm": "rms"},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_against_float64(variant: dict, device: torch.device, dtype: torch.dtype) -> None:
    for wide in (False, True) if dtype in (torch.bfloat16, torch.float16) else (False,):
        kwargs = arguments(device, dtype, **variant, wide=wide)
        streams = ops.depth_aggregation_step(**kwargs)
        expected = naive(**wide_arguments(kwargs))
        assert len(streams) == len(expected)
        for y, exact in zip(streams, expected, strict=True):
            assert y.dtype == dtype and y.shape == exact.shape
            assert relative_error(y, exact) < 2 * tolerance(dtype)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_eager(device: torch.device, dtype: torch.dtype, norm: str) -> None:
    kwargs = arguments(device, dtype, leading=(32,), width=256, sources=13, hidden=64, norm=norm)
    exact = naive(**wide_arguments(kwargs))
    for ours, eager, y in zip(ops.depth_aggregation_step(**kwargs), naive(**kwargs), exact, strict=True):
        assert relative_error(ours, y) <= 2 * relative_error(eager, y) + 1e-6


def test_sources_of_any_layout(device: torch.device) -> None:
    kwargs = arguments(device, torch.bfloat16, leading=(4,), norm="rms")
    exact = naive(**wide_arguments(kwargs))
    for layout in (
        lambda x: torch.stack([x, x], dim=1)[:, 1],  # rows with gaps
        lambda x: torch.cat([x[:, :1], x], dim=-1)[:, 1:],  # unaligned rows
        lambda x: x.t().contiguous().t(),  # strided columns
    ):
        changed = {**kwargs, "hiddens": [layout(x) for x in kwargs["hiddens"]], "w1": layout(kwargs["w1"])}
        for y, z in zip(ops.depth_aggregation_step(**changed), exact, strict=True):
            assert relative_error(y, z) < 2 * tolerance(torch.bfloat16)


@pytest.mark.parametrize("variant", [{}, {"norm": "layer", "hidden": None}, {"norm": "rms", "scale": True}], ids=str)
def test_opcheck(variant: dict, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        kwargs = arguments(device, dtype, **variant)
        torch.library.opcheck(torch.ops.muddformer.depth_aggregation_step, positional(kwargs))


def test_compiles(device: torch.device) -> None:
    kwargs = arguments(device, norm="rms")
    torch._dynamo.reset()
    compiled = torch.compile(lambda k: ops.depth_aggregation_step(**k), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for y, expected in zip(compiled(kwargs), ops.depth_aggregation_step(**kwargs), strict=True):
            assert torch.equal(y, expected)


def test_autocast(device: torch.device) -> None:
    kwargs = arguments(device, norm="rms", scale=True)
    with torch.autocast(device.type, torch.bfloat16):
        streams = ops.depth_aggregation_step(**kwargs)
    for y, exact in zip(streams, naive(**wide_arguments(kwargs)), strict=True):
        assert y.dtype == torch.bfloat16 and relative_error(y, exact) < 2 * tolerance(torch.bfloat16)


def test_gradients_are_refused(device: torch.device) -> None:
    kwargs = arguments(device, norm="layer", scale=True)
    for name, value in kwargs.items():
        if not isinstance(value, (Tensor, list)):
            continue
        wanting = {**kwargs, name: convert(value, lambda x: x.clone().requires_grad_())}
        with pytest.raises(RuntimeError, match="depth_aggregation_step has no gradients"):
            ops.depth_aggregation_step(**wanting)
        with torch.no_grad():
            streams = ops.depth_aggregation_step(**wanting)
        assert not any(y.requires_grad for y in streams)


def bad_arguments() -> dict[str, tuple[type, str, dict[str, Any]]]:
    good = arguments(norm="rms", scale=True)
    x, half = good["hiddens"], torch.float16
    return {
        "no-sources": (ValueError, r"hiddens: .*got none", {"hiddens": []}),
        "scalar": (ValueError, r"hiddens\[0\]: .*\[..., D\]", {"hiddens": [torch.tensor(1.0)] * 5}),
        "integer": (TypeError, r"hiddens\[0\]: .*got Int", {"hiddens": [t.int() for t in x]}),
        "other-dtype": (TypeError, r"hiddens\[4\]: .*got Half", {"hiddens": [*x[:4], x[4].to(half)]}),
        "other-shape": (ValueError, r"hiddens\[4\]: .*shape", {"hiddens": [*x[:4], x[4][:1]]}),
        "other-device": (ValueError, r"hiddens\[2\]: .*device", {"hiddens": [*x[:2], x[2].to("meta"), *x[3:]]}),
        "prior-shape": (ValueError, "prior: .*S = 5", {"prior": good["prior"][:, 1:]}),
        "prior-dtype": (TypeError, "prior: .*got Half", {"prior": good["prior"].to(half)}),
        "w1-alone": (ValueError, "w1 and w2: .*got w1 alone", {"w2": None}),
        "w2-alone": (ValueError, "w1 and w2: .*got w2 alone", {"w1": None}),
        "w1-shape": (ValueError, r"w1: .*\[K, D\]", {"w1": good["w1"][:, 1:]}),
        "w2-shape": (ValueError, r"w2: .*\[C\*S, K\]", {"w2": good["w2"][1:]}),
        "w2-dtype": (TypeError, "w2: .*got Half", {"w2": good["w2"].to(half)}),
        "scale-shape": (ValueError, r"scale: .*\[D\]", {"scale": good["scale"][1:]}),
        "scale-alone": (ValueError, "scale: expected None without w1", {"w1": None, "w2": None}),
        "eps": (ValueError, "eps: .*got -1", {"eps": -1.0}),
        "static-eps": (ValueError, "eps: .*got nan", {"w1": None, "w2": None, "scale": None, "eps": float("nan")}),
        "gelu": (ValueError, "gelu_approximate: .*got 'erf'", {"gelu_approximate": "erf"}),
        "cap": (ValueError, "cap: .*got 0", {"cap": 0.0}),
        "static-cap": (ValueError, "cap: .*got -1", {"w1": None, "w2": None, "scale": None, "cap": -1.0}),
        "norm": (ValueError, "norm: .*got 'batch'", {"norm": "batch"}),
        "no-norm": (ValueError, r"norm_weights\[0\]: expected None with norm='none'", {"norm": "none"}),
        "norm-eps": (ValueError, "norm_eps: .*got inf", {"norm_eps": float("inf")}),
        "weights-count": (
            ValueError,
            "norm_weights: .*C = 4 entries, got 3",
            {"norm_weights": good["norm_weights"][1:]},
        ),
        "weights-shape": (
            ValueError,
            r"norm_weights\[1\]: .*\[D\]",
            {"norm_weights": [None, torch.ones(5), None, None]},
        ),
        "weights-dtype": (
            TypeError,
            r"norm_weights\[0\]: .*got Half",
            {"norm_weights": [torch.ones(64, dtype=half), None, None, None]},
        ),
        "beside-norms": (
            ValueError,
            "norms: expected no other argument of the norms beside a StreamNorms",
            {"norms": ops.StreamNorms([], [], "none", 1e-6)},
        ),
        "biases-count": (ValueError, "norm_biases: .*got 1", {"norm_biases": [None]}),
        "biases-rms": (
            ValueError,
            r"norm_biases\[0\]: expected None",
            {"norm_biases": [torch.ones(64), None, None, None]},
        ),
    }


@pytest.mark.parametrize("case", bad_arguments())
def test_bad_arguments(case: str) -> None:
    error, message, changes = bad_arguments()[case]
    good = arguments(norm="rms", scale=True)
    with pytest.raises(error, match=message):
        ops.depth_aggregation_step(**{**good, **changes})


@pytest.mark.cuda
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_graph_of_a_chain_of_layers(batch: int, norm: str) -> None:
    """Captured launches overlap: each must still see what the one before it has written."""
    layers = [
        arguments("cuda", torch.bfloat16, leading=(batch, 1), width=1024, sources=4, ways=1, hidden=64, norm=norm)
        for _ in range(6)
    ]
    first = layers[0]["hiddens"][-1]

    def chain() -> Tensor:
        x = first
        for layer in layers:
            (x,) = ops.depth_aggregation_step(**{**layer, "hiddens": [*layer["hiddens"][:-1], x]})
        return x

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(20):
        first.normal_()
        graph.replay()
        replayed = result.clone()
        assert torch.equal(replayed, chain())


@pytest.mark.cuda
def test_repeats_bit_for_bit() -> None:
    kwargs = arguments("cuda", torch.bfloat16, leading=(3, 1), width=2560, sources=33, hidden=192, norm="rms")
    expected = ops.depth_aggregation_step(**kwargs)
    for _ in range(100):
        for y, first in zip(ops.depth_aggregation_step(**kwargs), expected, strict=True):
            assert torch.equal(y, first)


def test_norms_as_one_object() -> None:
    kwargs = arguments(norm="layer", scale=True)
    expected = ops.depth_aggregation_step(**kwargs)
    norms = ops.StreamNorms(kwargs.pop("norm_weights"), kwargs.pop("norm_biases"), kwargs.pop("norm"))
    for y, z in zip(ops.depth_aggregation_step(**kwargs, norms=norms), expected, strict=True):
        assert torch.equal(y, z)
    for field in ({"add_newest": True}, {"pre_weight": torch.ones(64)}, {"post_weight": torch.ones(64)}):
        with pytest.raises(ValueError, match=f"norms: expected none of .*, got {next(iter(field))}"):
            ops.depth_aggregation_step(**kwargs, norms=norms._replace(**field))


def test_fuses_step(device: torch.device) -> None:
    fast = device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    for dtype, leading, fits in (
        (torch.bfloat16, (1, 1), True),
        (torch.float32, (8, 8), True),
        (torch.bfloat16, (65,), False),
        (torch.float64, (1,), False),
    ):
        x = torch.empty(*leading, 64, dtype=dtype, device=device)
        assert ops.fuses_step(x) is (fits and fast)
        assert ops.fuses_step(x.to("meta")) is False
        with FakeTensorMode() as mode:
            assert ops.fuses_step(mode.from_tensor(x)) is (fits and fast)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fuses_step_when_compiling(dynamic: bool, device: torch.device) -> None:
    def branch(x: Tensor) -> Tensor:
        return x + 1 if ops.fuses_step(x) else x - 1

    torch._dynamo.reset()
    compiled = torch.compile(branch, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (2, 64, 65, 66):
        x = torch.zeros(tokens, 64, dtype=torch.bfloat16, device=device)
        assert torch.equal(compiled(x), branch(x))
