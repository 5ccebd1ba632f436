"""DepthAggregation and MUDDStack: a layer of connections alone, and other people's blocks in a stack."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from muddformer.nn import DepthAggregation, MUDDStack, RMSNorm, aggregation_plan
from muddformer.reference import connection_weights, depth_aggregate


class MLP(nn.Module):
    """A block with one stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return x + scale * torch.tanh(self.linear(x)) + shift


class Mixer(nn.Module):
    """A block with four streams."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, xq: Tensor, xk: Tensor, xv: Tensor, xr: Tensor) -> Tensor:
        return xr + self.linear(xv) * torch.sigmoid(xq - xk)


def stack_of(block: type[nn.Module], layers: int = 4, dim: int = 8, **options) -> MUDDStack:
    return MUDDStack([block(dim) for _ in range(layers)], dim, multiway=block is Mixer, **options)


def scramble(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


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
    from muddformer import ops

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


def test_plan() -> None:
    assert aggregation_plan(3) == {1: (0, 1), 2: (0, 1, 2), 3: (0, 1, 2, 3)}
    assert aggregation_plan(5, source_stride=2, block_stride=2) == {2: (0, 2), 4: (0, 2, 4), 5: (0, 2, 4, 5)}
    assert aggregation_plan(4, window=2) == {1: (0, 1), 2: (0, 1, 2), 3: (0, 2, 3), 4: (0, 3, 4)}
    assert aggregation_plan(4, window=1, last=False) == {1: (0, 1), 2: (0, 2), 3: (0, 3)}
    assert aggregation_plan(6, source_stride=2, window=3)[6] == (0, 4, 6)
    assert aggregation_plan(1) == {1: (0, 1)}


@pytest.mark.parametrize("block", [MLP, Mixer])
@pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"pre_norm": True, "post_norm": "residual"}])
def test_fresh_stack_equals_blocks(block: type[nn.Module], options: dict) -> None:
    stack, x = stack_of(block, **options), torch.randn(2, 3, 8)
    expected = x
    for layer in stack.layers:
        expected = layer(*[expected] * (4 if block is Mixer else 1))
    close([stack(x)], [expected])


@pytest.mark.parametrize("block", [MLP, Mixer])
def test_stack_equals_loop(block: type[nn.Module]) -> None:
    stack, x = scramble(stack_of(block)).double(), torch.randn(2, 3, 8).double()
    hiddens, streams = [x], [x] * 4
    for i, layer in enumerate(stack.layers):
        hiddens.append(layer(*streams[: 4 if block is Mixer else 1]))
        da = stack.dynamic_dense[i]
        weights = connection_weights(hiddens[-1], da.w1.weight, da.w2.weight, stack.dense_bs[i])
        streams = depth_aggregate(hiddens, weights)
    close([stack(x)], [streams[-1]])
    stack(x).sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_arguments_reach_every_block() -> None:
    stack, x = stack_of(MLP), torch.randn(2, 3, 8)
    close([stack(x, 0.0, shift=0.5)], [x + 4 * 0.5])


def test_takes_a_module_list_and_any_leading_shape() -> None:
    blocks = nn.ModuleList([MLP(8), MLP(8)])
    stack = MUDDStack(blocks, 8)
    assert stack.layers[0] is blocks[0]
    for shape in ((8,), (3, 8), (2, 3, 4, 8), (0, 8)):
        assert stack(torch.randn(shape)).shape == shape
    assert torch.equal(MUDDStack([], 8)(torch.ones(8)), torch.ones(8))


def test_plain_stack_has_no_connections() -> None:
    stack = stack_of(MLP, dense=False)
    assert not list(stack.connection_parameters())
    assert len(list(stack.parameters())) == 8


def test_stack_lives_with_torch() -> None:
    stack, x = scramble(stack_of(Mixer, pre_norm=True, post_norm="all")), torch.randn(2, 3, 8)
    twin = copy.deepcopy(stack)
    other = stack_of(Mixer, pre_norm=True, post_norm="all").to("meta").to_empty(device="cpu")
    other.load_state_dict(stack.state_dict())
    assert torch.equal(twin(x), stack(x)) and torch.equal(other(x), stack(x))
    grads = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    stack.gradient_checkpointing = True
    again = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    close(again, grads)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(x)
    assert (y - stack(x)).norm() <= 0.05 * stack(x).norm()
    y.float().sum().backward()


def test_distributed_data_parallel(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stack, x = scramble(stack_of(Mixer, source_stride=2, block_stride=2, pre_norm=True)), torch.randn(2, 3, 8)
        parallel = nn.parallel.DistributedDataParallel(stack)
        for _ in range(2):  # the second step fails if a parameter had no gradient
            parallel(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.compile
def test_stack_compiles() -> None:
    torch._dynamo.reset()
    stack = scramble(stack_of(MLP, layers=3, window=1))
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 5, 8)
    close([compiled(x)], [stack(x)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        close([compiled(torch.ones(3, 9, 8))], [stack(torch.ones(3, 9, 8))])


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
    (lambda: stack_of(MLP, ways="qk"), ValueError, "ways must be 'qkvr' with multiway=False, got 'qk'"),
    (lambda: stack_of(MLP, window=0), ValueError, "window must be from 1"),
    (lambda: stack_of(MLP, source_stride=0), ValueError, "source_stride must be from 1"),
    (lambda: stack_of(MLP, block_stride=1.5), TypeError, "block_stride must be an integer"),
    (lambda: MUDDStack([lambda x: x], 4), TypeError, "is not a Module subclass"),
    (lambda: MUDDStack([nn.LSTM(4, 4)], 4)(torch.ones(1, 4)), TypeError, "block 0 must return one tensor, got tuple"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


class InPlace(torch.nn.Linear):
    """A block that works in the plain loop, but not where its input is read again."""

    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x)
        return x


@pytest.mark.parametrize("options", [{}, {"block_stride": 2}])
def test_blocks_that_change_their_input_are_refused(options: dict) -> None:
    stack = MUDDStack([InPlace(8, 8) for _ in range(4)], 8, **options)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changes its input in place"):
        stack(torch.randn(2, 3, 8))


def test_wrong_widths_name_what_is_wrong() -> None:
    stack = MUDDStack([torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)], 8)
    with pytest.raises(ValueError, match=r"x must have shape \[..., dim\] with dim=8, got \[2, 7\]"):
        stack(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"block 1 must return the shape of its input \[2, 8\], got \[2, 4\]"):
        stack(torch.randn(2, 8))
    with pytest.raises(TypeError, match="layers must be a list of modules, got one Linear"):
        MUDDStack(torch.nn.Linear(8, 8), 8)


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
