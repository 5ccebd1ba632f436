"""The parts of the models: attention with rotary positions, feed-forward networks, norms.

B, T: batch and sequence length; D: model width; H: heads; E: width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._library import _C
from ..nn import BlockHistory, RMSNorm
from ..nn.norm import as_stream_norms, autocast_dtype, is_plain, plain_parameters
from .config import MUDDFormerConfig
from .kv_cache import KVCache

__all__ = ["Attention", "Block", "FeedForward", "Rotary", "RotaryEmbedding", "apply_rotary"]

_BUILT = bool(_C.cuda_version)
Attend = Callable[["Attention", Tensor, Tensor, Tensor, Any], Tensor]


class Rotary:
    """Cosines and sines of the positions of a forward, float32 [T, rotary_dim / 2] or [B, T, rotary_dim / 2] each.

    Not a tuple: the tensors in tuples that a block is called with are cast by the mixed precision of FSDP, and a
    position in 16 bits is another one.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def __iter__(self) -> Iterator[Tensor]:  # not for our blocks: torch.compile of 2.11 does not follow it
        yield self.cos
        yield self.sin


class RotaryEmbedding(nn.Module):
    """Tables of the cosines and sines of rotary positions, float32 [block_size, rotary_dim / 2] each.

    They are no part of the state dict, and are made anew whenever the module is moved or cast: they are right after
    ``to_empty`` of a model from the meta device, and stay float32 in a bfloat16 model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: MUDDFormerConfig, device: Any = None) -> None:
        super().__init__()
        self.base = config.rope_base
        self.shape = (config.block_size, config.rotary_dim // 2)
        for name in ("cos", "sin"):
            table = torch.empty(self.shape, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self, device: Any = None) -> None:
        """Makes the tables, on another device if one is given."""
        positions, half = self.shape
        device = self.cos.device if device is None else torch.device(device)
        if device.type == "meta":  # where arithmetic would import torch's compiler
            self.cos, self.sin = self.cos.to(device), self.sin.to(device)
            return
        frequencies = 1.0 / self.base ** (torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def forward(self, length: int, positions: Tensor | None = None) -> Rotary:
        """Cosines and sines [..., length, rotary_dim / 2] of the positions from 0 on, or of ``positions``.

        Args:
            length: number of positions.
            positions: int64 [length], or [B, length] where sequences differ.
        """
        if positions is not None:
            return Rotary(self.cos[positions], self.sin[positions])
        return Rotary(self.cos[:length], self.sin[:length])

    def extra_repr(self) -> str:
        return f"positions={self.shape[0]}, rotary_dim={2 * self.shape[1]}, base={self.base:g}"


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first entries of every head by its position, in the half-split form: entry i pairs with i + half.

    Args:
        x: [B, T, H, E].
        cos, sin: float32 [T, half] or [B, T, half], half <= E / 2. The other E - 2 * half entries pass through.

    Returns:
        [B, T, H, E] in the dtype of ``x``; computed in float32 (float64 for float64).
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x[..., :half], x[..., half : 2 * half]
    parts = [(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)]
    return torch.cat(parts if 2 * half == x.shape[-1] else [*parts, x[..., 2 * half :]], dim=-1)


class Attention(nn.Module):
    """Self-attention whose queries, keys and values may come from different streams.

    Args:
        config: the model's configuration.
        index: number of the block from 0, the place of its keys and values in a cache.
    """

    def __init__(self, config: MUDDFormerConfig, index: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.index = index
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_head
        self.causal = config.causal
        bias, kv_dim = config.use_linear_bias, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=bias, **factory)
        self.wk = nn.Linear(config.dim, kv_dim, bias=bias, **factory)
        self.wv = nn.Linear(config.dim, kv_dim, bias=bias, **factory)
        self.wo = nn.Linear(config.dim, config.dim, bias=bias, **factory)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, **factory) if config.use_qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, **factory) if config.use_qk_norm else None

    def forward(
        self,
        xq: Tensor,
        xk: Tensor,
        xv: Tensor,
        rotary: Rotary | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Attends to this and earlier positions, or to all of them without ``causal``.

        Args:
            xq, xk, xv: normed streams [B, T, D]; they may be one tensor.
            rotary: of the T positions; a pair of cosines and sines too.
            mask: bool [T, length of the cache], True where a query sees a key; or whatever ``attend`` takes. None:
                causal among the T, or none.
            cache: keys and values of earlier positions: a :class:`KVCache`, or what else has its ``update``.
            attend: computes the attention in place of :func:`scaled_dot_product`.

        Returns:
            [B, T, D].
        """
        pair = rotary if isinstance(rotary, tuple) else (rotary.cos, rotary.sin)
        projections = (self.wq, xq), (self.wk, xk), (self.wv, xv)
        q, k, v = (linear(w, x).unflatten(-1, (-1, self.head_dim)) for w, x in projections)
        q, k = (heads.transpose(1, 2) for heads in self._norm_and_rotate(q, k, *pair))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        y = (attend or scaled_dot_product)(self, q, k, v, mask)
        return linear(self.wo, y.flatten(-2))

    def _norm_and_rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        norms = () if self.q_norm is None else (self.q_norm, self.k_norm)
        if runs_operators(q):
            known = as_stream_norms(norms, q)
            if known is not None and known.kind != "layer" and all(fits_beside(w, q.dtype) for w in known.weights):
                return ops.qk_norm_rotary(q, k, cos, sin, *known.weights, eps=known.eps)
        if norms:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)


def scaled_dot_product(attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """What heads read: ``softmax(q k^T / sqrt(E)) v``.

    Args:
        attention: the module it belongs to.
        q: [B, H, T, E].
        k, v: [B, key/value heads, length, E].
        mask: see :meth:`Attention.forward`.

    Returns:
        [B, T, H, E].
    """
    causal = attention.causal and mask is None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=attention.grouped)
    return y.transpose(1, 2)


class FeedForward(nn.Module):
    """``config.feed_forward``: SwiGLU, ``w2(silu(w1 x) * w3 x)``, or GELU, ``w2(gelu(w1 x))``; [..., D] -> [..., D].

    Args:
        config: the model's configuration.
        width: hidden width.
    """

    def __init__(self, config: MUDDFormerConfig, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"bias": config.use_linear_bias, "device": device, "dtype": dtype}
        self.gelu_approximate = config.gelu_approximate
        self.w1 = nn.Linear(config.dim, width, **factory)
        self.w2 = nn.Linear(width, config.dim, **factory)
        self.w3 = nn.Linear(config.dim, width, **factory) if config.feed_forward == "swiglu" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], with ``residual`` added to it if one is given."""
        if self.w3 is None:
            hidden = F.gelu(linear(self.w1, x), approximate=self.gelu_approximate)
        else:
            gate, up = linear(self.w1, x), linear(self.w3, x)
            hidden = ops.swiglu(gate, up) if runs_operators(gate) else F.silu(gate) * up
        return linear(self.w2, hidden, residual)


class Block(nn.Module):
    """A Transformer block: attention and feed-forward network, each after a norm and added to the residual stream.

    In a :class:`muddformer.nn.MUDDStack` it makes its streams itself (``pulls_streams``).

    Args:
        config: the model's configuration.
        index: number of the block from 0.
        separate_norms: the q, k and v streams have a norm each (``attention_norms``) instead of one ``attention_norm``.
    """

    pulls_streams = True

    def __init__(
        self, config: MUDDFormerConfig, index: int, separate_norms: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.parallel = config.use_parallel_residual
        self.attention = Attention(config, index, **factory)
        self.feed_forward = FeedForward(config, config.ffn_widths[index], **factory)
        self.attention_norm = self.attention_norms = None
        if separate_norms:
            self.attention_norms = nn.ModuleList(make_norm(config, **factory) for _ in range(3))
        else:
            self.attention_norm = make_norm(config, **factory)
        self.ffn_norm = make_norm(config, **factory)

    @property
    def stream_norms(self) -> list[nn.Module | None]:
        """The norms of the four streams (xq, xk, xv, xr); the residual stream has none."""
        norms = [self.attention_norm] * 3 if self.attention_norms is None else list(self.attention_norms)
        return [*norms, None]

    def forward(
        self,
        *streams: Tensor,
        rotary: Rotary,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        attend: Attend | None = None,
        history: BlockHistory | None = None,
        normed: bool = False,
    ) -> Tensor:
        """The next hidden state.

        Args:
            streams: (xq, xk, xv, xr), or one stream x for all four, [B, T, D] each.
            rotary, mask, cache, attend: see :meth:`Attention.forward`.
            history: given with one stream, the newest hidden state: makes the four of it.
            normed: four streams have passed ``stream_norms`` already.

        Returns:
            ``A + FFN(Norm(A))`` with ``A = xr + Attention(...)``, or ``A + FFN(Norm(xr))`` if parallel; [B, T, D].
        """
        if history is not None:
            streams, normed = history.streams(streams[0], self.stream_norms), True
        *inputs, residual = streams
        if not inputs and self.attention_norm is not None:
            inputs = [self.attention_norm(residual)] * 3
        elif not normed:
            inputs = [norm(x) for norm, x in zip(self.stream_norms[:3], inputs or [residual] * 3, strict=True)]
        attended = self.attention(*inputs, rotary, mask, cache, attend)
        fused = runs_operators(residual) and is_plain(self.feed_forward, FeedForward)
        if self.parallel:
            x, normed = residual + attended, self.ffn_norm(residual)
        else:
            # What a feed-forward network that is called gets has the dtype of the stream, as the norm leaves it.
            x, normed = add_norm(self.ffn_norm, attended, residual, None if fused else residual.dtype)
        return self.feed_forward(normed, x) if fused else x + self.feed_forward(normed)


def runs_operators(x: Tensor) -> bool:
    """Whether the parts of a block are operators of the library: on CUDA, if this is a build for it, but for a DTensor.

    Under torch.compile too, which makes a slower step of the same formulas, and keeps more of it for the backward.
    """
    return _BUILT and type(x) is Tensor and x.is_cuda


def fits_beside(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether operators take a weight or a residual beside tensors of a dtype: of that dtype or float32."""
    return tensor.dtype in (dtype, torch.float32)


def linear(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``residual + module(x)``, for a plain linear layer by one operator (:func:`muddformer.ops.linear`)."""
    if runs_operators(x):
        parameters = plain_parameters(module, x, nn.Linear)
        if parameters is not None and (residual is None or fits_beside(residual, autocast_dtype(x) or x.dtype)):
            return ops.linear(x, *parameters, residual)
    y = module(x)
    return y if residual is None else residual + y


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``residual + x`` and its norm, for a plain norm by one operator (:func:`muddformer.ops.add_norm`).

    Args:
        dtype: of the normed tensor, see the operator.
    """
    stream = residual.dtype
    added = x.dtype == stream or (stream == torch.float32 and x.dtype in (torch.bfloat16, torch.float16))
    known = as_stream_norms([norm], residual) if added and runs_operators(residual) else None
    if known is not None and fits_beside(known.weights[0], stream):
        bias = None if known.biases is None else known.biases[0]
        return ops.add_norm(x, residual, known.weights[0], bias, norm=known.kind, eps=known.eps, dtype=dtype)
    total = residual + x
    return total, norm(total)


def make_norm(config: MUDDFormerConfig, device: Any = None, dtype: Any = None) -> nn.Module:
    """The norm over the model width that ``config.norm`` names."""
    kind = {"rms": RMSNorm, "layer": nn.LayerNorm}[config.norm]
    return kind(config.dim, config.norm_eps, device=device, dtype=dtype)
