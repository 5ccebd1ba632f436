"""Sample inputs of the ops, and the tolerances they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that counts as equal to a float64 result, of the largest entry."""
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected entry."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp_min(1e-30)
    return ((actual.double() - expected.double()).abs().max() / scale).item()


@dataclass
class AggregateSample:
    """Arguments of depth_aggregate: S hidden states [..., D] and weights [..., C, S]."""

    name: str
    hiddens: list[Tensor]
    weights: Tensor

    def detached(self, dtype: torch.dtype | None = None) -> AggregateSample:
        """Leaves that require gradients; a tensor that stands twice stays one leaf."""
        leaves: dict[int, Tensor] = {}
        for x in self.hiddens:
            leaves.setdefault(id(x), x.detach().to(dtype or x.dtype).requires_grad_())
        return AggregateSample(
            self.name,
            [leaves[id(x)] for x in self.hiddens],
            self.weights.detach().to(dtype or self.weights.dtype).requires_grad_(),
        )


def aggregate_samples(device: torch.device, dtype: torch.dtype) -> Iterator[AggregateSample]:
    """Ones, odd sizes, every number of ways, many sources, and every memory layout."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64).to(dtype)

    for leading, width, sources, ways in [
        ((1,), 1, 1, 1),
        ((3,), 1, 2, 4),
        ((2, 3), 7, 3, 4),
        ((5,), 8, 1, 4),
        ((2, 2), 33, 4, 2),
        ((4,), 64, 5, 3),
        ((2, 5), 130, 13, 4),
        ((3,), 100, 9, 5),
        ((2,), 72, 3, 9),
        ((7,), 256, 25, 4),
        ((2,), 40, 65, 4),
        ((), 24, 3, 4),
    ]:
        yield AggregateSample(
            f"tokens{leading}-D{width}-S{sources}-C{ways}",
            [make(*leading, width) for _ in range(sources)],
            make(*leading, ways, sources),
        )
    yield AggregateSample("no-tokens", [make(2, 0, 16) for _ in range(3)], make(2, 0, 4, 3))
    x = make(3, 20)
    yield AggregateSample("same-tensor-twice", [x, make(3, 20), x], make(3, 4, 3))
    yield AggregateSample("sliced-tokens", [make(4, 6, 24)[:, ::2] for _ in range(3)], make(4, 6, 4, 3)[:, ::2])
    yield AggregateSample("sliced-width", [make(5, 48)[:, 3:27] for _ in range(3)], make(5, 4, 7)[..., 2:5])
    yield AggregateSample("strided-width", [make(5, 48)[:, ::2] for _ in range(3)], make(5, 8, 3)[:, ::2])
    yield AggregateSample("expanded", [make(1, 24).expand(5, 24), make(5, 24)], make(4, 2).expand(5, 4, 2))
    transposed = [make(3, 5, 16).transpose(0, 1) for _ in range(2)]
    yield AggregateSample("transposed", transposed, make(3, 5, 4, 2).transpose(0, 1))


@dataclass
class WeightsSample:
    """Arguments of connection_weights."""

    name: str
    x: Tensor
    w1: Tensor
    w2: Tensor
    prior: Tensor
    options: dict = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """The tensor arguments, scale last where there is one."""
        scale = self.options.get("scale")
        return [self.x, self.w1, self.w2, self.prior, *([] if scale is None else [scale])]

    def detached(self, dtype: torch.dtype | None = None) -> WeightsSample:
        """Leaves that require gradients."""
        tensors = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.tensors()]
        options = dict(self.options)
        if len(tensors) == 5:
            options["scale"] = tensors[4]
        return WeightsSample(self.name, *tensors[:4], options)


def weights_samples(device: torch.device, dtype: torch.dtype) -> Iterator[WeightsSample]:
    """Every option, ones and odd sizes, no tokens, sliced input, and float32 prior and scale."""

    def make(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64).to(like)

    def sample(
        name: str, leading: tuple[int, ...], width: int, k: int, ways: int, sources: int, **options
    ) -> WeightsSample:
        return WeightsSample(
            name,
            make(*leading, width),
            make(k, width) / width**0.5,
            make(ways * sources, k) / k**0.5,
            make(ways, sources),
            options,
        )

    yield sample("plain", (2, 3), 24, 20, 4, 5)
    # A norm over one number is its sign: without a large eps its gradient is all cancellation.
    yield sample("ones", (1,), 1, 1, 1, 1, eps=0.5)
    yield sample("tanh", (4,), 17, 8, 4, 2, gelu_approximate="tanh")
    yield sample("cap", (2, 2), 32, 12, 4, 3, cap=1.5)
    yield sample("scale", (5,), 16, 8, 2, 4, scale=make(16), eps=1e-5)
    yield sample("everything", (3, 2), 40, 64, 4, 13, scale=make(40), eps=1e-3, gelu_approximate="tanh", cap=10.0)
    yield sample("no-tokens", (2, 0), 16, 8, 4, 2)
    yield sample("one-token", (), 16, 8, 4, 2)
    sliced = sample("sliced", (4, 6), 16, 8, 4, 2)
    sliced.x = make(4, 12, 16)[:, ::2]
    yield sliced
    if dtype in (torch.bfloat16, torch.float16):
        wide = sample("float32-prior-and-scale", (3, 4), 32, 16, 4, 3)
        wide.prior = make(4, 3, like=torch.float32)
        wide.options["scale"] = make(32, like=torch.float32)
        yield wide


@dataclass
class CrossEntropySample:
    """Arguments of linear_cross_entropy."""

    name: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    options: dict = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """The tensors that have gradients."""
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    def detached(self, dtype: torch.dtype | None = None) -> CrossEntropySample:
        """Leaves that require gradients."""
        tensors = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.tensors()]
        return CrossEntropySample(
            self.name, *tensors[:2], self.targets, tensors[2] if len(tensors) == 3 else None, self.options
        )


def cross_entropy_samples(device: torch.device, dtype: torch.dtype) -> Iterator[CrossEntropySample]:
    """Every option, chunks that do not divide the tokens, odd numbers of classes, ignored targets, every layout."""

    def sample(
        name: str, leading: tuple[int, ...], width: int, classes: int, bias: bool = False, **options
    ) -> CrossEntropySample:
        def make(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float64).to(dtype)

        targets = torch.randint(classes, leading, device=device)
        hidden, weight = make(*leading, width), make(classes, width) / width**0.5
        return CrossEntropySample(name, hidden, weight, targets, make(classes) if bias else None, options)

    yield sample("plain", (2, 3), 24, 40)
    yield sample("ones", (1,), 1, 1)
    yield sample("one-token", (), 16, 9)
    yield sample("no-tokens", (2, 0), 16, 9)
    yield sample("chunks", (3, 5), 24, 61, chunk=4)
    yield sample("sum", (7,), 16, 33, True, reduction="sum", chunk=3)
    yield sample("none", (2, 7), 16, 40, True, reduction="none", chunk=5)
    yield sample("smoothing", (2, 5), 17, 50, label_smoothing=0.1, chunk=7)
    yield sample("z-loss", (11,), 32, 1000, z_loss=1e-2)
    everything = sample("everything", (4, 9), 40, 77, True, label_smoothing=0.2, z_loss=1e-3, ignore_index=5, chunk=10)
    everything.targets[0, :] = everything.targets[2, 3] = 5
    yield everything
    ignored = sample("all-ignored", (2, 3), 24, 40, True, z_loss=1e-2)
    ignored.targets.fill_(-100)
    yield ignored
    sliced = sample("strided", (6, 24), 16, 48, chunk=9)
    sliced.hidden, sliced.targets = sliced.hidden[:, ::2, 3:11], sliced.targets[:, 1::2].int()
    sliced.weight = sliced.weight[::2, ::2]
    sliced.targets %= 24
    yield sliced
    turned = sample("transposed", (5, 4), 16, 40)
    turned.hidden, turned.weight = turned.hidden.transpose(0, 1), turned.weight[:16, :16].t()
    turned.targets = turned.targets.t() % 16
    yield turned
    if dtype in (torch.bfloat16, torch.float16):
        wide = sample("float32-head", (3, 4), 32, 56, True, chunk=5)
        wide.weight, wide.bias = wide.weight.float() / 3, wide.bias.float() / 3
        yield wide


@dataclass
class LinearSample:
    """Arguments of linear."""

    name: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [t for t in self.arguments() if t is not None]

    def arguments(self) -> list[Tensor | None]:
        """In the order of the schema."""
        return [self.x, self.weight, self.bias, self.residual]

    def detached(self, dtype: torch.dtype | None = None) -> LinearSample:
        """Leaves that require gradients."""
        leaves = (t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in self.arguments())
        return LinearSample(self.name, *leaves)


def linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[LinearSample]:
    """With and without bias and residual, ones and odd sizes, no tokens, every layout, float32 beside 16 bits."""

    def make(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64).to(like)

    yield LinearSample("plain", make(2, 3, 24), make(40, 24) / 5)
    yield LinearSample("bias", make(7, 16), make(33, 16) / 4, make(33))
    yield LinearSample("residual", make(2, 9, 32), make(64, 32) / 6, None, make(2, 9, 64))
    yield LinearSample("everything", make(2, 8, 64), make(48, 64) / 8, make(48), make(2, 8, 48))
    yield LinearSample("odd", make(5, 13), make(7, 13) / 4, make(7), make(5, 7))
    yield LinearSample("ones", make(1, 1), make(1, 1), make(1), make(1, 1))
    yield LinearSample("one-token", make(16), make(24, 16) / 4, None, make(24))
    yield LinearSample("no-tokens", make(2, 0, 16), make(24, 16), make(24), make(2, 0, 24))
    sliced = [make(6, 12, 48)[:, ::2, 8:40], make(128, 64)[::2, ::2] / 6, make(128)[::2], make(6, 12, 64)[:, 1::2]]
    yield LinearSample("strided", *sliced)
    turned = [make(5, 4, 16).transpose(0, 1), make(16, 40).t() / 4, make(1).expand(40), make(40).expand(4, 5, 40)]
    yield LinearSample("transposed", *turned)
    if dtype in (torch.bfloat16, torch.float16):
        wide = torch.float32
        yield LinearSample(
            "float32-parameters", make(3, 8, 32), make(56, 32, like=wide) / 6, make(56, like=wide), make(3, 8, 56)
        )
        yield LinearSample("float32-residual", make(3, 8, 32), make(56, 32) / 6, None, make(3, 8, 56, like=wide))
