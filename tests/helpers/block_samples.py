"""Sample inputs of the operators of a Transformer's block: swiglu, add_norm, qk_norm_rotary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from .op_samples import DTYPES, relative_error, tolerance

NARROW = (torch.bfloat16, torch.float16)


@dataclass
class Sample:
    """Arguments of an operator: tensors (or None) by position, and options by name."""

    name: str
    tensors: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[int, ...] = ()  # tensors without gradients

    def run(self, function: Callable) -> list[Tensor]:
        """The results as a list."""
        results = function(*self.tensors, **self.options)
        return [results] if isinstance(results, Tensor) else list(results)

    def leaves(self) -> list[Tensor]:
        """The tensors that have gradients."""
        return [t for i, t in enumerate(self.tensors) if t is not None and i not in self.constants]

    def detached(self, dtype: torch.dtype | None = None) -> Sample:
        """Leaves that require gradients, of another dtype if one is given; memory layouts stay."""
        tensors = [
            t if t is None or i in self.constants else t.detach().to(dtype or t.dtype).requires_grad_()
            for i, t in enumerate(self.tensors)
        ]
        options = dict(self.options)
        if dtype is not None and options.get("dtype") is not None:
            options["dtype"] = dtype
        return Sample(self.name, tensors, options, self.constants)


def results_and_gradients(function: Callable, sample: Sample, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Results, and gradients of their sum weighed with fixed random numbers."""
    leaves = sample.detached(dtype)
    results = leaves.run(function)
    return [*results, *torch.autograd.grad(results, leaves.leaves(), incoming(results))]


def incoming(results: list[Tensor]) -> list[Tensor]:
    """Random gradients of the results, of numbers that all dtypes have: in each they are the same to the last bit."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in results]


def check(ours: Callable, naive: Callable, sample: Sample) -> None:
    """Results and gradients are as near to float64 as PyTorch's steps are, but for a factor of two."""
    wide = results_and_gradients(naive, sample, torch.float64)
    steps = results_and_gradients(naive, sample)
    actual = results_and_gradients(ours, sample)
    leaves = sample.leaves()
    for i, (a, b, w) in enumerate(zip(actual, steps, wide, strict=True)):
        assert a.shape == b.shape == w.shape and a.dtype == b.dtype, i
        coarse = max((t.dtype for t in [a, *leaves]), key=tolerance)
        floor = torch.finfo(coarse).eps / 2 if coarse in NARROW else tolerance(coarse)  # rounded once
        assert relative_error(a, w) <= max(2 * relative_error(b, w), floor), (i, relative_error(b, w))


def find(samples: Callable, name: str, device: torch.device, dtype: torch.dtype) -> Sample:
    """The sample of a name."""
    torch.manual_seed(0)
    return next(sample for sample in samples(device, dtype) if sample.name == name)


def cases(samples: Callable) -> list[Any]:
    """(dtype, name) of all samples of all dtypes."""
    return [
        pytest.param(dtype, sample.name, id=f"{dtype}-{sample.name}")
        for dtype in DTYPES
        for sample in samples(torch.device("cpu"), dtype)
    ]


def maker(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Random tensors; float64 first, so that all dtypes have the same numbers."""
    return lambda *shape: torch.randn(shape, dtype=torch.float64).to(device, dtype)


def swiglu_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Odd widths, every memory layout, gate and up in one tensor."""
    make = maker(device, dtype)
    for shape in [(1,), (7,), (3, 5), (2, 3, 33), (4, 64), (2, 5, 136), (3, 1000), (0, 8), (2, 0)]:
        yield Sample(f"apart-{'x'.join(map(str, shape))}", [make(*shape), make(*shape)])
    for shape in [(2,), (3, 6), (2, 3, 64), (5, 272), (0, 16)]:
        yield Sample(f"fused-{'x'.join(map(str, shape))}", [make(*shape), None])
    gate, up = make(5, 48).chunk(2, -1)
    yield Sample("halves", [gate, up])
    yield Sample("odd-slices", [make(5, 40)[:, 3:36], make(10, 33)[::2]])
    yield Sample("transposed", [make(16, 5).t(), make(5, 16)])
    yield Sample("expanded", [make(1, 16).expand(5, 16), make(5, 1).expand(5, 16)])
    yield Sample("extreme", [30 * make(6, 32), make(6, 32)])


def add_norm_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Both norms, odd widths, wide rows, every memory layout, and a float32 residual beside a branch of 16 bits."""
    make = maker(device, dtype)

    def tensors(*shape: int, bias: bool = False) -> list[Tensor | None]:
        return [make(*shape), make(*shape), 1 + make(shape[-1]) / 3, make(shape[-1]) if bias else None]

    shapes = [(1,), (3, 7), (2, 3, 33), (5, 64), (4, 136), (3, 1000), (2, 2, 1024), (9, 2560), (300, 256), (0, 8)]
    for shape in shapes:
        name = "x".join(map(str, shape))
        yield Sample(f"rms-{name}", tensors(*shape), {"eps": 1e-5})
        if shape[-1] > 1:  # one entry is its own mean
            yield Sample(f"layer-{name}", tensors(*shape, bias=True), {"norm": "layer", "eps": 1e-5})
    yield Sample("layer-no-bias", tensors(5, 40), {"norm": "layer"})
    sliced = tensors(5, 24)
    sliced[0], sliced[1] = make(5, 48)[:, 3:27], make(10, 40)[::2, 8:32]
    yield Sample("slices", sliced)
    turned = tensors(5, 16)
    turned[0], turned[1] = make(16, 5).t(), make(1, 16).expand(5, 16)
    yield Sample("transposed-and-expanded", turned)
    if dtype in NARROW:
        wide = tensors(6, 72)
        wide[2] = wide[2].float()
        yield Sample("float32-weight", wide)
        for norm in ("rms", "layer"):
            for width in (33, 136, 2048):
                stream = [t if t is None else t.float() for t in tensors(7, width, bias=norm == "layer")]
                stream[0] = stream[0].to(dtype)
                yield Sample(f"float32-residual-{norm}-{width}", stream, {"norm": norm, "dtype": dtype})
        stream = [make(6, 40), *(t.float() for t in tensors(6, 40)[1:3])]
        yield Sample("float32-residual-normed-float32", stream)


def qk_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Grouped heads, partial rotation, odd widths, every memory layout, with and without norms."""
    make = maker(device, dtype)

    def sample(
        name: str, batch: int, tokens: int, heads: int, kv_heads: int, width: int, half: int, norms: bool = True
    ) -> Sample:
        angles = 7 * torch.rand(tokens, half, device=device)
        weights = [1 + make(width) / 3, 1 + make(width) / 3] if norms else [None, None]
        q, k = make(batch, tokens, heads, width), make(batch, tokens, kv_heads, width)
        return Sample(name, [q, k, angles.cos(), angles.sin(), *weights], {"eps": 1e-5}, (2, 3))

    yield sample("plain", 2, 5, 4, 4, 64, 32)
    yield sample("grouped", 2, 7, 6, 2, 64, 32)
    yield sample("one-key-head", 1, 3, 5, 1, 128, 64)
    yield sample("no-norms", 2, 5, 4, 2, 64, 32, norms=False)
    yield sample("quarter", 2, 5, 4, 4, 64, 8)
    yield sample("eighty", 2, 3, 8, 8, 80, 40)
    yield sample("eighty-quarter", 2, 3, 3, 3, 80, 10)
    yield sample("no-rotation", 1, 4, 2, 2, 32, 0)
    yield sample("small", 1, 1, 1, 1, 2, 1)
    yield sample("odd", 2, 3, 3, 1, 6, 2)
    yield sample("odd-no-norms", 2, 3, 3, 1, 10, 3, norms=False)
    yield sample("wide", 1, 3, 2, 1, 256, 128)
    yield sample("wider", 1, 3, 2, 1, 320, 160)
    yield sample("widest", 1, 3, 2, 1, 512, 128)
    yield sample("too-wide", 1, 3, 2, 1, 520, 256)
    for width in (64, 256, 320, 512):  # a CUDA kernel of vectors takes no weights that begin between two
        apart = sample(f"weights-between-vectors-{width}", 1, 3, 2, 1, width, width // 2)
        apart.tensors[4:] = [torch.cat([t[:1], t])[1:] for t in apart.tensors[4:]]
        yield apart
    yield sample("odd-width", 1, 3, 2, 1, 7, 3)
    yield sample("many", 3, 70, 12, 4, 32, 16)
    yield sample("no-tokens", 2, 0, 4, 2, 16, 8)
    sliced = sample("slices", 2, 5, 4, 2, 16, 8)
    wide = make(2, 5, 8 * 16)
    sliced.tensors[0] = wide[..., : 4 * 16].unflatten(-1, (4, 16))
    sliced.tensors[1] = wide[..., 4 * 16 : 6 * 16].unflatten(-1, (2, 16))
    yield sliced
    odd = sample("odd-slices", 2, 5, 2, 2, 16, 8)
    odd.tensors[0], odd.tensors[1] = make(2, 5, 2, 19)[..., 3:], make(2, 2, 5, 16).transpose(1, 2)
    yield odd
    own = sample("own-positions", 3, 5, 4, 2, 32, 16)
    angles = 7 * torch.rand(3, 5, 16, device=device)
    own.tensors[2:4] = angles.cos(), angles.sin()
    yield own
    shared = sample("one-row-of-positions", 3, 5, 4, 2, 32, 16)
    shared.tensors[2:4] = (table[None] for table in shared.tensors[2:4])
    yield shared
    if dtype in NARROW:
        float32 = sample("float32-weights", 2, 5, 4, 2, 64, 32)
        float32.tensors[4:] = [t.float() for t in float32.tensors[4:]]
        yield float32
