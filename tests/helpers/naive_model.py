"""A whole model as one writes it from the specification, in float64, from its parameters by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.models import make, scramble, some_ids
from muddformer import MUDDFormerConfig
from muddformer.reference import connection_weights, depth_aggregate


def naive_norm(c: MUDDFormerConfig, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if c.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], c.norm_eps)
    return naive_rms(x, p[f"{name}.weight"], c.norm_eps)


def naive_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def naive_rotary(c: MUDDFormerConfig, x: Tensor) -> Tensor:
    """Each pair (i, i + half) is a complex number, turned by position / base^(i / half); tables in float32."""
    half = int(c.dim // c.n_head * c.rotary_pct) // 2
    angles = torch.arange(x.shape[1])[:, None].float() * (1 / c.rope_base ** (torch.arange(half).float() / half))
    turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


def naive_block(c: MUDDFormerConfig, p: dict[str, Tensor], i: int, streams: list[Tensor]) -> Tensor:
    """Block i counted from 0, spec section 1."""
    name = f"layers.{i}"
    norms = [f"{name}.attention_norms.{way}" for way in range(3)]
    if f"{norms[0]}.weight" not in p:
        norms = [f"{name}.attention_norm"] * 3

    def linear(which: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.{which}.weight"], p.get(f"{name}.{which}.bias"))

    q, k, v = (
        linear(f"attention.w{way}", naive_norm(c, p, norm, x)).unflatten(-1, (-1, c.dim // c.n_head))
        for way, norm, x in zip("qkv", norms, streams[:3], strict=True)
    )
    if c.use_qk_norm:
        q = naive_rms(q, p[f"{name}.attention.q_norm.weight"], c.norm_eps)
        k = naive_rms(k, p[f"{name}.attention.k_norm.weight"], c.norm_eps)
    q, k = naive_rotary(c, q), naive_rotary(c, k)
    k, v = (x.repeat_interleave(c.n_head // c.n_kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    if c.causal:
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.softmax(-1)
    attention = linear("attention.wo", torch.einsum("bhqk,bkhe->bqhe", weights, v).flatten(-2))
    a = streams[3] + attention
    h = naive_norm(c, p, f"{name}.ffn_norm", streams[3] if c.use_parallel_residual else a)
    if c.feed_forward == "gelu":
        inner = F.gelu(linear("feed_forward.w1", h), approximate=c.gelu_approximate)
    else:
        inner = F.silu(linear("feed_forward.w1", h)) * linear("feed_forward.w3", h)
    return a + linear("feed_forward.w2", inner)


def naive_logits(c: MUDDFormerConfig, p: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The whole model from its parameters by name, in float64, spec sections 1 to 5."""
    raw = [p["tok_embeddings.weight"][ids]]
    streams = raw * 4
    aggregations = [i for i in range(1, c.n_layer) if i % c.block_stride == 0] + [c.n_layer] * ("r" in c.ways)
    aggregations = aggregations if c.dense else []

    def source(j: int) -> Tensor:
        if not c.pre_norm:
            return raw[j]
        name = f"dynamic_dense.{aggregations.index(j)}.pre_norm" if j in aggregations else f"source_norms.{j}"
        return naive_rms(raw[j], p[f"{name}.weight"], c.norm_eps)

    for i in range(1, c.n_layer + 1):
        raw.append(naive_block(c, p, i - 1, streams))
        streams = [raw[i]] * 4
        if i not in aggregations:
            continue
        name = f"dynamic_dense.{aggregations.index(i)}"
        near = range(0 if c.window is None else max(0, i - c.window + 1), i + 1)
        sources = sorted({0, i} | {j for j in near if j % c.source_stride == 0})
        prior = p[f"dense_bs.{aggregations.index(i)}"]
        assert prior.shape[-1] == len(sources)
        if c.dynamic:
            scale = p[f"{name}.norm.weight"] if c.pre_norm else None
            w1, w2 = p[f"{name}.w1.weight"], p[f"{name}.w2.weight"]
            options = {"eps": c.norm_eps, "gelu_approximate": c.gelu_approximate, "cap": c.cap}
            weights = connection_weights(raw[i], w1, w2, prior, scale=scale, **options)
        else:
            weights = prior if c.cap is None else c.cap * torch.tanh(prior / c.cap)
            weights = weights.expand(*ids.shape, *prior.shape)
        mixed = depth_aggregate([source(j) for j in sources], weights)
        if c.post_norm != "none":
            normed = {"residual": [len(mixed) - 1] if "r" in c.ways else [], "all": range(len(mixed))}[c.post_norm]
            for way in normed:
                mixed[way] = naive_rms(mixed[way], p[f"{name}.post_norms.{way}.weight"], c.norm_eps)
            mixed = [raw[i] + y for y in mixed]
        ways = [way for way in "qkvr" if way in c.ways]
        if len(mixed) == 1 and (i == c.n_layer or not c.multiway):
            streams = mixed * 4
        else:
            streams = [mixed[ways.index(way)] if way in ways else raw[i] for way in "qkvr"]
    x = naive_norm(c, p, "norm", streams[3])
    return F.linear(x, p.get("output.weight", p["tok_embeddings.weight"]))


def check_against_naive(variant: str) -> None:
    """Logits, loss and every gradient of a model of a variant, in float64."""
    model = scramble(make(variant)).double()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    ids, targets = some_ids(), some_ids()
    logits, expected = model(ids), naive_logits(model.config, parameters, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    loss = model(ids, targets)
    loss.backward()
    expected = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        grad = parameters[name].grad
        assert parameter.grad is not None and grad is not None, f"no gradient for {name}"
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
