"""Other people's blocks in a stack."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from helpers.models import scramble
from muddformer.nn import MUDDStack
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


def close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=1e-5, atol=1e-5)


def test_checkpointed_blocks(device: torch.device) -> None:
    stack = MUDDStack([torch.nn.Linear(8, 8) for _ in range(6)], 8, flush_interval=3).to(device, torch.float64)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    x = torch.randn(2, 8, device=device, dtype=torch.float64)
    grads = []
    for stack.gradient_checkpointing in (False, True):
        grads.append(torch.autograd.grad(stack(x).square().sum(), list(stack.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("flush_interval", [1, 3])
def test_deferred_gradients_of_a_float32_history_under_autocast(flush_interval: int) -> None:
    stack = scramble(stack_of(MLP, residual_dtype="float32", flush_interval=flush_interval))
    plain = stack_of(MLP, residual_dtype="float32")
    plain.load_state_dict(stack.state_dict())
    x = torch.randn(2, 3, 8)
    results = []
    for model in (stack, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert results[0][0].dtype == torch.float32
    close(*results)


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
    (lambda: stack_of(MLP, ways="qk"), ValueError, "ways must be 'qkvr' with multiway=False, got 'qk'"),
    (lambda: stack_of(MLP, window=0), ValueError, "window must be from 1"),
    (lambda: stack_of(MLP, source_stride=0), ValueError, "source_stride must be from 1"),
    (lambda: stack_of(MLP, block_stride=1.5), TypeError, "block_stride must be an integer"),
    (
        lambda: MUDDStack([], 8, window=2, flush_interval=4),
        ValueError,
        "flush_interval must be None or 1 with a window",
    ),
    (lambda: MUDDStack([nn.Linear(4, 4), None], 4), TypeError, r"layers\[1\] must be a module, got .* NoneType"),
    (lambda: MUDDStack([lambda x: x], 4), TypeError, r"layers\[0\] must be a module, got .* function"),
    (lambda: MUDDStack(None, 4), TypeError, "layers must be a list of modules, got .* NoneType"),
    (lambda: stack_of(MLP)([1.0]), TypeError, "x must be a tensor, got .* list"),
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
