"""More than 2^31 elements in a tensor, forward and backward: places must not be counted in 32 bits.

Tokens do not know of each other, so the first and last ones of a large call are compared with a small call of these
alone; the gradients that come in are zero elsewhere, so that those of parameters are the small call's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.op_samples import relative_error, tolerance
from muddformer import ops

WIDTH = 1024
TOKENS = 2**31 // WIDTH + 4099
ENDS = 64
NEEDED = 60 << 30  # bytes of the largest case, below


class Case(NamedTuple):
    """What an operator is called with.

    Attributes:
        tokens: shapes of tensors of tokens, without the leading number of tokens.
        parameters: shapes of the others.
        call: makes tensors of tokens of both lists.
    """

    tokens: list[tuple[int, ...]]
    parameters: list[tuple[int, ...]]
    call: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]


def chained(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    streams, hiddens = ops.depth_aggregate_chained(tokens[:-1], tokens[-1])
    return [*streams, *hiddens]


def normed(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    return ops.depth_aggregate_norm_chained(tokens[:-1], tokens[-1], [*parameters, None])[0]


def pre_and_post_normed(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    pre, post, first = parameters
    norms = ops.StreamNorms([first, None], add_newest=True, pre_weight=pre, post_weight=post)
    return ops.depth_aggregate_norm_chained(tokens[:-1], tokens[-1], norms)[0]


def flushed(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    """Two layers leave the gradient of the oldest hidden state to the flush."""
    old, young, *weights = tokens
    older, deferrals = ops.defer_gradients([old], [(1, 2), (1, 2)])
    streams = []
    for w, deferral in zip(weights, deferrals, strict=True):
        made, (*older, young) = ops.depth_aggregate_chained([*older, young], w, deferral)
        streams += made
    return streams


def generated(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    w1, w2, prior = parameters
    return ops.connection_weights_chained(tokens[0], w1, w2, prior)


def turned(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    q, k = (x.unflatten(-1, (-1, 64))[None] for x in tokens)
    # All tokens at one angle: those at the ends are at the same one in the small call.
    angles = torch.full((len(tokens[0]), 32), 0.5, device=q.device)
    q, k = ops.qk_norm_rotary(q, k, angles.cos(), angles.sin(), *parameters)
    return q[0].flatten(-2), k[0].flatten(-2)


def gated(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    return [ops.swiglu(*tokens)]


def added(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    return ops.add_norm(*tokens, *parameters)


def multiplied(tokens: list[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    return [ops.linear(tokens[0], parameters[0], residual=tokens[1])]


ROW, NORM = (WIDTH,), (WIDTH,)
CASES = {
    "depth_aggregate": Case([ROW, ROW, (2, 2)], [], chained),
    "depth_aggregate_norm": Case([ROW, ROW, (2, 2)], [NORM], normed),
    "pre_and_post_norm": Case([ROW, ROW, (2, 2)], [NORM, NORM, NORM], pre_and_post_normed),
    "deferred_flush": Case([ROW, ROW, (1, 2), (1, 2)], [], flushed),
    "connection_weights": Case([ROW], [(64, WIDTH), (8, 64), (4, 2)], generated),
    "qk_norm_rotary": Case([ROW, ROW], [(64,), (64,)], turned),
    "swiglu": Case([ROW, ROW], [], gated),
    "add_norm": Case([ROW, ROW], [NORM], added),
    "linear": Case([ROW, ROW], [(WIDTH, WIDTH)], multiplied),
}
# Narrow hidden states of more tokens, so that weights and hidden rows have as many elements.
NARROW = 64


def ends(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:ENDS], tensor[-ENDS:]]).detach()


def compare(case: Case, count: int, device: torch.device, dtype: torch.dtype) -> None:
    """A call of so many tokens with one of its ends."""
    tokens = [torch.empty(count, *shape, device=device, dtype=dtype).normal_() for shape in case.tokens]
    parameters = [
        torch.empty(shape, device=device, dtype=dtype).normal_(std=shape[-1] ** -0.5) for shape in case.parameters
    ]
    few = [ends(x).requires_grad_() for x in tokens]
    expected = case.call(few, [p.requires_grad_() for p in parameters])
    few_grads = [torch.randn_like(y) for y in expected]
    expected_grads = torch.autograd.grad(expected, [*few, *parameters], few_grads)
    results = case.call([x.requires_grad_() for x in tokens], parameters)
    grads = []
    for y, few_grad in zip(results, few_grads, strict=True):
        grads.append(torch.zeros_like(y))
        grads[-1][:ENDS], grads[-1][-ENDS:] = few_grad.chunk(2)
    made = torch.autograd.grad(results, [*tokens, *parameters], grads)
    made_of_tokens, made_of_parameters = made[: len(tokens)], made[len(tokens) :]
    for grad in made_of_tokens:
        assert not any(part.any() for part in grad[ENDS:-ENDS].split(1 << 18))
    compared = [*map(ends, results), *map(ends, made_of_tokens), *made_of_parameters]
    for large, small in zip(compared, [*expected, *expected_grads], strict=True):
        assert relative_error(large, small) < tolerance(dtype)  # sums may have another order


def compare_large(case: Case, count: int) -> None:
    if torch.cuda.mem_get_info(0)[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free device memory")
    compare(case, count, torch.device("cuda"), torch.bfloat16)
    torch.cuda.empty_cache()


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_tokens_beyond_32_bits(name: str) -> None:
    compare_large(CASES[name], TOKENS)


@pytest.mark.cuda
def test_weights_beyond_32_bits() -> None:
    """The weights, their hidden rows and x have more than 2^31 elements each."""
    case = Case([(NARROW,)], [(64, NARROW), (64, 64), (4, 16)], generated)
    compare_large(case, 2**31 // 64 + 4099)


@pytest.mark.cuda
def test_logits_beyond_32_bits() -> None:
    """All logits at once against chunks of few tokens."""
    if torch.cuda.mem_get_info(0)[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free device memory")
    count, classes = 2**16 + 40, 2**15 + 8
    make = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(count, NARROW, **make).requires_grad_()
    head = torch.empty(classes, NARROW, **make).normal_(std=0.1).requires_grad_()
    targets = torch.randint(classes, (count,), device="cuda")
    results = []
    for chunk in (count, 4096):
        losses = ops.linear_cross_entropy(hidden, head, targets, reduction="none", chunk=chunk)
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), [hidden, head])])
        del losses
        torch.cuda.empty_cache()
    for large, small in zip(*results, strict=True):
        assert relative_error(large, small) < tolerance(torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_compared_tokens(name: str) -> None:
    """The comparison itself, with few tokens."""
    compare(CASES[name], 2 * ENDS + 37, torch.device("cpu"), torch.float32)
