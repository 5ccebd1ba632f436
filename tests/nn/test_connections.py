"""Connections, the history that a forward carries, and blocks that make their streams of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.models import scramble
from muddformer import MUDDFormerConfig, build_model, reference
from muddformer.nn import BlockHistory, ConnectionOptions, Connections, DepthAggregation, MUDDStack, RMSNorm

D = 16


class MLP(nn.Module):
    """x + f(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(D)
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(self.norm(x)))


class Four(nn.Module):
    """A block of four streams."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(D) for _ in range(3))
        self.f = nn.Linear(D, D)

    def forward(self, xq: Tensor, xk: Tensor, xv: Tensor, xr: Tensor) -> Tensor:
        q, k, v = (norm(x) for norm, x in zip(self.norms, (xq, xk, xv), strict=True))
        return self.mix(q, k, v, xr)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, xr: Tensor) -> Tensor:
        return xr + torch.tanh(self.f(q * k + v))


class Pulling(Four):
    """The same, making its streams itself."""

    pulls_streams = True

    def forward(self, x: Tensor, *, history: BlockHistory) -> Tensor:
        return self.mix(*history.streams(x, [*self.norms, None]))


def some_x() -> Tensor:
    return torch.randn(2, 3, D, generator=torch.Generator().manual_seed(2))


def gradients(module: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(module.parameters()), allow_unused=True))


OPTIONS = [{}, {"block_stride": 2, "source_stride": 2}, {"pre_norm": True, "post_norm": "all"}, {"flush_interval": 2}]


@pytest.mark.parametrize("multiway", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loop_by_hand_is_a_stack(multiway: bool, options: dict) -> None:
    stack = scramble(MUDDStack([(Four if multiway else MLP)() for _ in range(5)], D, multiway=multiway, **options))
    history = stack.begin(some_x())
    for i, block in enumerate(stack.layers):
        assert history.index == i
        history.append(block(*history.streams()))
    by_hand, by_stack = history.result(), stack(some_x())
    assert torch.equal(by_hand, by_stack)
    for mine, whole in zip(gradients(stack, by_hand), gradients(stack, by_stack), strict=True):
        assert (mine is None and whole is None) or torch.equal(mine, whole)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_that_pull_their_streams(options: dict, recompute: bool) -> None:
    torch.manual_seed(0)
    ready = scramble(MUDDStack([Four() for _ in range(5)], D, multiway=True, **options))
    pulling = MUDDStack([Pulling() for _ in range(5)], D, multiway=True, **options)
    pulling.load_state_dict(ready.state_dict())
    pulling.gradient_checkpointing = recompute
    one, two = ready(some_x()), pulling(some_x())
    assert torch.equal(one, two)
    for a, b in zip(gradients(ready, one), gradients(pulling, two), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_connections_have_the_parameters_of_a_stack() -> None:
    connections = Connections(D, 4, ConnectionOptions(multiway=True, pre_norm=True))
    stack = MUDDStack([Four() for _ in range(4)], D, multiway=True, pre_norm=True)
    names = [name for name, _ in stack.named_parameters() if not name.startswith("layers.")]
    assert [name for name, _ in connections.named_parameters()] == names
    assert len(list(connections.connection_parameters())) == len(names)


def test_history_out_of_order() -> None:
    connections = Connections(D, 2)
    history = connections.begin(some_x())
    with pytest.raises(RuntimeError, match=r"append\(\) takes what block 0 .* streams\(\) was not called"):
        history.append(some_x())
    with pytest.raises(RuntimeError, match="only 0 of 2 blocks had their turn"):
        history.result()
    streams = history.streams()
    with pytest.raises(RuntimeError, match="streams of block 0 were made already"):
        history.streams()
    with pytest.raises(TypeError, match="block 0 must return one tensor, got tuple"):
        history.append((some_x(),))
    with pytest.raises(ValueError, match=r"block 0 must return the shape of its input \[2, 3, 16\], got \[2, 3, 4\]"):
        history.append(some_x()[..., :4])
    history.append(streams[0] + 1)
    with pytest.raises(RuntimeError, match="block 1"):  # what was appended is not appended again
        history.append(streams[0])
    history.append(history.streams()[0] + 1)
    with pytest.raises(RuntimeError, match="all 2 blocks had their turn"):
        history.streams()
    assert history.result().shape == (2, 3, D)
    for call in (history.result, history.streams, lambda: history.append(some_x())):
        with pytest.raises(RuntimeError, match=r"comes after result\(\), with which a history ends"):
            call()
    with pytest.raises(ValueError, match=r"x must have shape \[..., dim\] with dim=16, got \[2, 3, 5\]"):
        connections.begin(torch.zeros(2, 3, 5))


def test_a_block_that_does_not_pull() -> None:
    class Forgets(Pulling):
        def forward(self, x: Tensor, *, history: BlockHistory) -> Tensor:
            return x + 1

    with pytest.raises(RuntimeError, match=r"block 0 has pulls_streams, but did not call history.streams\(\)"):
        MUDDStack([Forgets()], D, multiway=True)(some_x())

    class Twice(Pulling):
        def forward(self, x: Tensor, *, history: BlockHistory) -> Tensor:
            return super().forward(x, history=history) + history.streams(x)[0]

    with pytest.raises(RuntimeError, match="streams of block 0 were made already"):
        MUDDStack([Twice()], D, multiway=True)(some_x())


class Checkpointed(nn.Module):
    """A block in a wrapper that passes its attributes on, as those of torch.distributed do."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.module = block
        self.reentrant = reentrant

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor:
        function = lambda *given: self.module(*given, **kwargs)  # noqa: E731
        return checkpoint(function, *args, use_reentrant=self.reentrant)


def test_checkpoint_wrappers_around_blocks_that_pull() -> None:
    plain = scramble(MUDDStack([Pulling() for _ in range(3)], D, multiway=True))
    wrapped = MUDDStack([Checkpointed(block, False) for block in plain.layers], D, multiway=True)
    for name in ("dense_bs", "dynamic_dense"):
        getattr(wrapped, name).load_state_dict(getattr(plain, name).state_dict())
    one, two = plain(some_x()), wrapped(some_x())
    assert torch.equal(one, two)
    for a, b in zip(gradients(plain.layers, one), gradients(plain.layers, two), strict=True):
        assert torch.equal(a, b)
    reentrant = MUDDStack([Checkpointed(block, True) for block in plain.layers], D, multiway=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reentrant(some_x().requires_grad_())


def test_blocks_compiled_by_themselves_get_ready_streams() -> None:
    """So that all of them share one graph: the number of sources is another one for each."""
    model = scramble(build_model(MUDDFormerConfig(vocab_size=11, block_size=8, n_layer=4, n_head=2, dim=32)))
    ids = torch.arange(8)[None]
    expected = model(ids)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    for block in model.layers:
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert not any("depth_aggregate" in str(node.target) for graph in graphs for node in graph.graph.nodes)


class SoftmaxOverDepth(DepthAggregation):
    """Weights of one's own: a softmax over the sources."""

    def connection_weights(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        a = self.w2(F.gelu(self.w1(F.rms_norm(x, x.shape[-1:])))).unflatten(-1, prior.shape)
        return (a + prior).softmax(-1), x


class SoftmaxStack(MUDDStack):
    aggregation_class = SoftmaxOverDepth


@pytest.mark.parametrize("grad", [True, False])
def test_weights_of_a_subclass(grad: bool) -> None:
    stack = scramble(SoftmaxStack([Pulling() for _ in range(3)], D, multiway=True)).double()
    assert all(type(da) is SoftmaxOverDepth for da in stack.dynamic_dense)
    with torch.set_grad_enabled(grad):
        x = some_x().double()
        mine, history = stack(x), [x]
        for i, block in enumerate(stack.layers):
            streams = [x] * 4
            if i > 0:
                da, prior = stack.dynamic_dense[i - 1], stack.dense_bs[i - 1]
                streams = reference.depth_aggregate(history, da.connection_weights(x, prior)[0])
            x = Four.forward(block, *streams)
            history.append(x)
        last = stack.dynamic_dense[-1].connection_weights(x, stack.dense_bs[-1])[0]
        naive = reference.depth_aggregate(history, last)[-1]
    torch.testing.assert_close(mine, naive)
    if grad:
        for a, b in zip(gradients(stack, mine), gradients(stack, naive), strict=True):
            torch.testing.assert_close(a, b)


def test_options_whole_or_by_fields() -> None:
    options = ConnectionOptions(multiway=True, window=3, cap=4)
    assert options.cap == 4.0 and options.ways == "qkvr"
    by_fields = MUDDStack([Four()] * 3, D, multiway=True, window=3, cap=4)
    assert MUDDStack([Four()] * 3, D, options).options == by_fields.options == options
    assert MUDDStack([Four()] * 3, D, options, cap=None).options.cap is None
    config = MUDDFormerConfig(n_layer=2, dim=32, n_head=2, cap=4, window=3)
    assert MUDDStack([Four()] * 3, D, config).options == options  # a configuration has the options in it
    assert build_model(config, device="meta").dynamic_dense[0].options == options
    assert not DepthAggregation(D, 3).options.round64 and DepthAggregation(D, 3, options=options).options.round64


BAD_OPTIONS = [
    (lambda: MUDDStack([MLP()], D, windows=3), TypeError, "unknown option 'windows'"),
    (lambda: DepthAggregation(D, 2, widow=3), TypeError, "unknown option 'widow'"),
    (lambda: MUDDStack([MLP()], D, {"window": 3}), TypeError, "options must be a ConnectionOptions, got dict"),
    (lambda: ConnectionOptions(multiway=1), TypeError, "multiway must be True or False, got 1"),
    (lambda: ConnectionOptions(ways="qr"), ValueError, "ways must be 'qkvr' with multiway=False, got 'qr'"),
    (lambda: ConnectionOptions(window=4, flush_interval=3), ValueError, "got flush_interval=3 and window=4"),
    (lambda: ConnectionOptions(residual_dtype="bfloat16"), ValueError, "residual_dtype must be one of .*'float32'"),
    (lambda: ConnectionOptions(post_norm=1), TypeError, "post_norm must be a string"),
    (lambda: ConnectionOptions(window=0), ValueError, "window must be from 1 to 65536, got 0"),
]


@pytest.mark.parametrize("make, error, message", BAD_OPTIONS, ids=[case[2] for case in BAD_OPTIONS])
def test_bad_options(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("residual_dtype", [None, "autocast", "float32"])
def test_dtype_of_the_residual_stream(dense: bool, residual_dtype: str | None) -> None:
    model = build_model(
        MUDDFormerConfig(
            vocab_size=11, block_size=8, n_layer=3, n_head=2, dim=32, dense=dense, residual_dtype=residual_dtype
        )
    )
    seen: list[torch.dtype] = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model.layers[-1].ffn_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    ids = torch.arange(8)[None]
    expected = {None: torch.bfloat16 if dense else torch.float32, "autocast": torch.bfloat16, "float32": torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids)
    assert seen == [expected[residual_dtype]] * 2
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    seen.clear()
    exact = model(ids, ids)  # without autocast there is nothing to choose
    assert seen == [torch.float32] * 2 and abs(exact - loss).item() < 0.05


@pytest.mark.parametrize("residual_dtype, expected", [("float32", torch.float32), ("autocast", torch.bfloat16)])
def test_residual_dtype_of_blocks_of_ones_own(residual_dtype: str, expected: torch.dtype) -> None:
    stack = scramble(MUDDStack([nn.Linear(D, D) for _ in range(3)], D, residual_dtype=residual_dtype))
    seen: list[torch.dtype] = []
    for block in stack.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    for x in (some_x(), some_x().bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert stack(x).dtype == expected
    assert seen == [expected] * 6


def test_a_loop_by_hand_refuses_blocks_that_write_into_their_streams() -> None:
    history = Connections(D, 2).begin(some_x())
    (x,) = history.streams()
    x += 1
    with pytest.raises(RuntimeError, match="block 0 changes its input in place"):
        history.append(x)


def test_norms_of_a_block_without_aggregation() -> None:
    history = Connections(D, 2, multiway=True).begin(some_x())
    with pytest.raises(ValueError, match="norms must have 4 entries, got 1"):
        history.streams([None])
    with pytest.raises(TypeError, match="norms must be a list of norms, got a value of type int"):
        history.streams(5)
    with pytest.raises(TypeError, match=r"norms\[1\] must be a norm or None, got a value of type int"):
        history.streams([None, 5, None, None])
