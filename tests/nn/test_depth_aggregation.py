"""A layer of connections alone, and RMSNorm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.models import scramble
from muddformer import ops
from muddformer.nn import DepthAggregation, RMSNorm
from muddformer.reference import connection_weights, depth_aggregate


def close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=1e-5, atol=1e-5)


def test_rms_norm() -> None:
    norm, x = scramble(RMSNorm(6, eps=0.1)), torch.randn(3, 6)
    close([norm(x)], [x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight])
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert (RMSNorm(6, init=0.5).weight == 0.5).all()


@pytest.mark.parametrize("ways", ["qkvr", "qr", "v", 1, 3])
@pytest.mark.parametrize("options", [{}, {"cap": 2.0, "gelu_approximate": "tanh", "eps": 0.1}, {"dynamic": False}])
def test_depth_aggregation(ways: str | int, options: dict) -> None:
    da = scramble(DepthAggregation(6, 3, ways, **options))
    hiddens = [torch.randn(2, 5, 6) for _ in range(3)]
    streams, handed_on = da(hiddens)
    if options.get("dynamic", True):
        weights = connection_weights(hiddens[-1], da.w1.weight, da.w2.weight, da.prior, **options)
    else:
        weights = da.prior.expand(2, 5, -1, -1)
    mixed = depth_aggregate(hiddens, weights)
    if isinstance(ways, str):
        mixed = [mixed[ways.index(way)] if way in ways else hiddens[-1] for way in "qkvr"]
    close(streams, mixed)
    close(handed_on, hiddens)


@pytest.mark.parametrize("reading", ["residual", "all"])
def test_pre_and_post_norm(reading: str) -> None:
    da = scramble(DepthAggregation(6, 2, "kr", pre_norm=True, post_norm=reading))
    hiddens = [torch.randn(2, 5, 6) for _ in range(2)]
    streams, handed_on = da(hiddens)
    normed = [hiddens[0], da.pre_norm(hiddens[1])]
    weights = connection_weights(hiddens[1], da.w1.weight, da.w2.weight, da.prior, scale=da.norm.weight)
    k, r = depth_aggregate(normed, weights)
    x = hiddens[1]
    close(streams, [x, x + (da.post_norms[0](k) if reading == "all" else k), x, x + da.post_norms[1](r)])
    close(handed_on, normed)


@pytest.mark.parametrize(
    "options",
    [{}, {"dynamic": False}, {"cap": 10.0}, {"cap": 1.5}, {"post_norm": "all"}, {"pre_norm": True, "post_norm": "all"}],
)
def test_fresh_passes_newest_on(options: dict) -> None:
    hiddens = [torch.randn(2, 5, 6) for _ in range(4)]
    for ways in ("qkvr", "v", 2):
        streams, _ = DepthAggregation(6, 4, ways, **options)(hiddens)
        for stream in streams:
            torch.testing.assert_close(stream, hiddens[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("expand", "round64", "width"), [(1, False, 16), (4, False, 64), (4, True, 128), (1, True, 64)]
)
def test_hidden_width(expand: int, round64: bool, width: int) -> None:
    da = DepthAggregation(6, 4, expand=expand, round64=round64)
    assert da.w1.weight.shape == (width, 6) and da.w2.weight.shape == (16, width)


def test_static_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ops, "depth_aggregate_chained", lambda h, w, deferral: seen.append(w) or (list(h), list(h)))
    DepthAggregation(6, 2, 2, dynamic=False)([torch.randn(3, 5, 6)] * 2)
    assert seen[0].shape == (3, 5, 2, 2) and seen[0].stride() == (0, 0, 2, 1)


def test_meta_factory_and_repr() -> None:
    da = DepthAggregation(6, 3, pre_norm=True, post_norm="all", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in da.parameters())
    da.to_empty(device="cpu").reset_parameters()
    fresh = DepthAggregation(6, 3, pre_norm=True, post_norm="all", dtype=torch.bfloat16)
    for name, value in da.state_dict().items():
        assert value.shape == fresh.state_dict()[name].shape
        if not name.startswith("w1"):
            assert torch.equal(value, fresh.state_dict()[name])
    assert "6, sources=3, ways='qkvr', dynamic=True" in repr(DepthAggregation(6, 3))
    assert "cap=2" in repr(DepthAggregation(6, 3, cap=2))


def test_autocast_with_parameters_of_another_low_precision() -> None:
    da = DepthAggregation(16, 2, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        streams, _ = da([torch.randn(3, 16), torch.randn(3, 16)])
    assert streams[0].dtype == torch.bfloat16


@pytest.mark.cuda
def test_decoding_under_autocast_casts_a_hidden_state_once() -> None:
    da = scramble(DepthAggregation(64, 3)).cuda()
    hiddens = [torch.randn(2, 1, 64, device="cuda") for _ in range(3)]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        streams, handed_on = da(hiddens)
        _, again = da(handed_on)
    assert all(x.dtype == torch.bfloat16 for x in (*streams, *handed_on))
    assert all(x is y for x, y in zip(handed_on, again, strict=True))


BAD = [
    (lambda: DepthAggregation(0, 2), ValueError, "dim must be from 1"),
    (lambda: DepthAggregation(4.0, 2), TypeError, "dim must be an integer, got 4.0"),
    (lambda: DepthAggregation(4, True), TypeError, "sources must be an integer, got True"),
    (lambda: DepthAggregation(4, 0), ValueError, "sources must be from 1"),
    (lambda: DepthAggregation(4, 2, 0), ValueError, "ways must be from 1"),
    (lambda: DepthAggregation(4, 2, ""), ValueError, "ways must be a part of 'qkvr'"),
    (lambda: DepthAggregation(4, 2, "qq"), ValueError, "ways must be a part of 'qkvr'.* got 'qq'"),
    (lambda: DepthAggregation(4, 2, "qx"), ValueError, "ways must be a part of 'qkvr'.* got 'qx'"),
    (lambda: DepthAggregation(4, 2, None), TypeError, "ways must be a string"),
    (lambda: DepthAggregation(4, 2, cap=0), ValueError, "cap must be more than 0"),
    (lambda: DepthAggregation(4, 2, cap=float("nan")), ValueError, "cap must be more than 0 and finite, got nan"),
    (lambda: DepthAggregation(4, 2, eps="x"), TypeError, "eps must be a number, got 'x'"),
    (lambda: DepthAggregation(4, 2, eps=-1e-6), ValueError, "eps must be more than 0"),
    (lambda: DepthAggregation(4, 2, expand=0), ValueError, "expand must be from 1"),
    (lambda: DepthAggregation(4, 2, post_norm=True), TypeError, "post_norm must be a string"),
    (lambda: DepthAggregation(4, 2, post_norm="both"), ValueError, "post_norm must be one of"),
    (lambda: DepthAggregation(4, 2, gelu_approximate="erf"), ValueError, "gelu_approximate must be one of"),
    (lambda: DepthAggregation(4, 2)([torch.ones(4)]), ValueError, "hiddens must be 2 tensors, got 1"),
    (lambda: DepthAggregation(4, 1, prior=False)([torch.ones(4)]), ValueError, "prior must be given"),
    (lambda: DepthAggregation(4, 1, prior="x"), TypeError, "prior must be True or False, got 'x'"),
    (lambda: DepthAggregation(4, 1)([torch.ones(3)]), ValueError, r"hiddens must have shape \[..., dim\] with dim=4"),
    (
        lambda: DepthAggregation(4, 1)([torch.ones(4)], torch.zeros(4, 2)),
        ValueError,
        r"prior must have shape \[4, 1\], got \[4, 2\]",
    ),
    (lambda: RMSNorm((2, 3)), TypeError, "dim must be an integer"),
    (lambda: RMSNorm(4, -1.0), ValueError, "eps must be more than 0 and at most 1, got -1.0"),
    (lambda: DepthAggregation(4, 2, cap=10**400), ValueError, "cap must be more than 0 and finite"),
]


def test_number_of_ways_of_numpy() -> None:
    assert DepthAggregation(4, 2, np.int64(3)).num_ways == 3


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
