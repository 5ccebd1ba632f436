"""The models: every variant against a naive formulation of the specification, and how they live with torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muddformer import MUDDFormer, MUDDFormerConfig, build_model
from muddformer.reference import connection_weights, depth_aggregate

SMALL = {
    "n_layer": 5, "dim": 32, "n_head": 4, "vocab_size": 61, "intermediate_size": 48, "block_size": 24,
    "ffn_reallocation": False, "rotary_pct": 1.0,
}  # fmt: skip

VARIANTS = {
    "default": {},
    "pythia": {"model_type": "muddpythia", "rotary_pct": 0.5},
    "pythia-sequential": {"model_type": "muddpythia", "use_parallel_residual": False, "use_linear_bias": False},
    "parallel-biased": {"use_parallel_residual": True, "use_linear_bias": True},
    "plain": {"dense": False},
    "plain-pythia": {"dense": False, "model_type": "muddpythia"},
    "static": {"dynamic": False},
    "denseformer": {"dynamic": False, "multiway": False},
    "one-way": {"multiway": False},
    "static-cap": {"dynamic": False, "cap": 3.0},
    "cap": {"cap": 10.0},
    "tanh": {"gelu_approximate": "tanh", "model_type": "muddpythia"},
    "ways-qkv": {"ways": "qkv"},
    "ways-v": {"ways": "v"},
    "ways-r": {"ways": "r"},
    "ways-rq": {"ways": "rq", "pre_norm": True, "post_norm": "residual"},
    "stride-2x2": {"source_stride": 2, "block_stride": 2},
    "stride-3x2-norms": {"source_stride": 3, "block_stride": 2, "pre_norm": True, "post_norm": "residual"},
    "stride-1x3-one-way": {"block_stride": 3, "multiway": False},
    "stride-beyond": {"source_stride": 9, "block_stride": 9},
    "window-1": {"window": 1},
    "window-2": {"window": 2, "source_stride": 2},
    "window-beyond": {"window": 50},
    "pre-post": {"pre_norm": True, "post_norm": "residual"},
    "pre-post-all": {"pre_norm": True, "post_norm": "all"},
    "pre": {"pre_norm": True},
    "post": {"post_norm": "residual"},
    "pre-post-static": {"pre_norm": True, "post_norm": "residual", "dynamic": False},
    "pre-post-one-way": {"pre_norm": True, "post_norm": "all", "multiway": False},
    "shared-norms": {"separate_norms": False},
    "flush-2": {"flush_interval": 2},
    "flush-3-norms": {"flush_interval": 3, "pre_norm": True, "post_norm": "residual"},
    "narrow": {"expand_last": False, "round64": False},
    "no-qk-norm": {"use_qk_norm": False},
    "gqa": {"n_kv_heads": 2},
    "mqa-tied": {"n_kv_heads": 1, "tie_word_embeddings": True},
    "reallocation": {"ffn_reallocation": True, "intermediate_size": 256},
    "one-layer": {"n_layer": 1, "ffn_reallocation": True},
}


def make(variant: str = "default", **changes) -> MUDDFormer:
    return build_model(MUDDFormerConfig(**{**SMALL, **VARIANTS[variant], **changes}))


def scramble(model: MUDDFormer, alpha: float = 0.2) -> MUDDFormer:
    """Moves every parameter off its initial value, so that each one counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=alpha)
    return model


def some_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length))


def naive_norm(c: MUDDFormerConfig, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if c.model_type == "muddpythia":
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
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    attention = linear("attention.wo", torch.einsum("bhqk,bkhe->bqhe", weights, v).flatten(-2))
    a = streams[3] + attention
    h = naive_norm(c, p, f"{name}.ffn_norm", streams[3] if c.use_parallel_residual else a)
    if c.model_type == "muddpythia":
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_naive(variant: str) -> None:
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
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "pre" and VARIANTS[v].get("dense", True)])
def test_fresh_equals_plain_twin(variant: str) -> None:
    model = make(variant)
    twin, ids = model.plain_twin(), some_ids()
    assert not any("dense" in name for name in twin.state_dict())
    assert twin.config == model.config.replace(dense=False)
    if model.config.cap is None:
        assert torch.equal(model(ids), twin(ids))
    else:
        torch.testing.assert_close(model(ids), twin(ids), rtol=1e-5, atol=1e-5)


def test_plain_twin_needs_equal_norms() -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.attention_norms differ"):
        scramble(make()).plain_twin()


def test_initial_values() -> None:
    torch.manual_seed(1)
    model = make(dim=256, n_layer=3)
    state = model.state_dict()
    for n in range(3):
        prior, w1 = state[f"dense_bs.{n}"], state[f"dynamic_dense.{n}.w1.weight"]
        assert prior.shape == (4 if n < 2 else 1, n + 2)
        assert torch.equal(prior, F.one_hot(torch.tensor(n + 1), n + 2).float().expand_as(prior))
        assert w1.std().item() == pytest.approx(1 / 16, rel=0.05)
        assert not state[f"dynamic_dense.{n}.w2.weight"].any()
    assert [state[f"dynamic_dense.{n}.w1.weight"].shape[0] for n in range(3)] == [64, 64, 64]
    assert state["layers.0.attention.wq.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    state = make(pre_norm=True, post_norm="residual").state_dict()
    assert not any(state[f"dense_bs.{n}"].any() for n in range(5))
    assert (state["dynamic_dense.0.post_norms.3.weight"] == 1e-3).all()
    assert (state["source_norms.0.weight"] == 1).all()


def test_generator_widths() -> None:
    model = make(n_layer=16)
    widths = [da.w1.out_features for da in model.dynamic_dense]
    sizes = [4 * (i + 2) for i in range(15)] + [17 * 4]
    assert widths == [(size // 64 + 1) * 64 for size in sizes]
    assert widths[14] == 128  # 4 * 16 = 64 is an exact multiple and still grows


def test_loss_ignores_and_is_float32() -> None:
    model, ids = make().bfloat16(), some_ids()
    targets = ids.clone()
    targets[:, 3:] = -100
    loss = model(ids.int(), targets.int())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(ids[:, :3], targets[:, :3]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("variant", ["default", "pythia", "stride-3x2-norms", "mqa-tied"])
def test_meta_device(variant: str) -> None:
    config = MUDDFormerConfig(**{**SMALL, **VARIANTS[variant]})
    model, ids = build_model(config, device="meta"), some_ids()
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])
    assert model(ids.to("meta")).shape == (2, 7, 61)
    filled = build_model(config)
    empty = model.to_empty(device="cpu")
    empty.load_state_dict(filled.state_dict())
    assert torch.equal(empty(ids), filled(ids))
    with torch.device("meta"):
        assigned = build_model(config)
    assigned.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(assigned(ids), filled(ids))
    torch.manual_seed(3)
    empty.reset_parameters()
    assert torch.equal(empty(ids), empty.plain_twin()(ids)) and not torch.equal(empty(ids), filled(ids))


def test_rotary_tables_stay_float32() -> None:
    model = make().bfloat16()
    assert model.rotary.cos.dtype == torch.float32
    assert torch.equal(model.rotary.cos, make().rotary.cos)
    assert not any("rotary" in name for name in model.state_dict())


def test_deepcopy_and_state_dict() -> None:
    model, ids = scramble(make("stride-3x2-norms")), some_ids()
    twin = copy.deepcopy(model)
    other = make("stride-3x2-norms")
    other.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids), model(ids)) and torch.equal(other(ids), model(ids))
    twin.dense_bs[0].data.zero_()
    assert not torch.equal(twin(ids), model(ids))


@pytest.mark.parametrize("variant", ["default", "pythia", "static", "pre-post", "stride-2x2", "plain"])
def test_checkpointing(variant: str) -> None:
    model, ids = scramble(make(variant)), some_ids()
    model(ids, ids).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    model(ids, ids).backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", ["default", "pythia", "static", "pre-post", "ways-qkv", "cap"])
def test_autocast(variant: str) -> None:
    model, ids = scramble(make(variant), alpha=0.05), some_ids()  # larger weights amplify rounding
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(ids), model(ids, ids)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (logits - expected).norm() <= 0.1 * expected.norm()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, ids = make(), some_ids()
    logits = build_model(model.config, dtype=dtype)
    logits.load_state_dict(model.state_dict())
    assert (logits(ids) - model(ids)).norm() <= 0.05 * model(ids).norm()


@pytest.mark.parametrize("variant", ["default", "plain", "pre-post"])
def test_trains(variant: str) -> None:
    model, ids = make(variant), some_ids(4, 16)
    connections = set(map(id, model.connection_parameters()))
    assert connections == {id(p) for n, p in model.named_parameters() if n.startswith(("dense", "dynamic", "source"))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(20):
        loss = model(ids, ids.roll(-1, 1))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_causal() -> None:
    model, ids = scramble(make("pythia")), some_ids()
    changed = ids.clone()
    changed[:, 4] += 1
    changed %= SMALL["vocab_size"]
    assert torch.equal(model(ids)[:, :4], model(changed)[:, :4])
    assert not torch.equal(model(ids)[:, 4:], model(changed)[:, 4:])


def bad_inputs() -> Iterator[tuple]:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    yield [1, 2], None, TypeError, "input_ids must be a tensor, got list"
    yield ids.float(), None, TypeError, "input_ids must be int64 or int32, got torch.float32"
    yield ids.bool(), None, TypeError, "input_ids must be int64 or int32, got torch.bool"
    yield ids[0], None, ValueError, r"input_ids must be \[batch, tokens\], got shape \[5\]"
    yield ids[None], None, ValueError, r"got shape \[1, 2, 5\]"
    yield ids.repeat(1, 5), None, ValueError, "input_ids must have at most block_size=24 tokens, got 25"
    yield ids + 61, None, IndexError, "input_ids must be from 0 to vocab_size - 1 = 60, got 61 to 61"
    yield ids - 1, None, IndexError, "input_ids .* got -1 to -1"
    yield ids.to("meta"), None, ValueError, "input_ids must be on cpu, like the model, got meta"
    yield ids, ids[:, :4], ValueError, r"targets must have the shape of input_ids \[2, 5\], got \[2, 4\]"
    yield ids, ids.float(), TypeError, "targets must be int64 or int32, got torch.float32"
    yield ids, 3, TypeError, "targets must be a tensor, got int"


@pytest.mark.parametrize(("ids", "targets", "error", "match"), list(bad_inputs()))
def test_bad_inputs(ids: Tensor, targets: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make("one-layer")(ids, targets)


def test_bad_build() -> None:
    with pytest.raises(TypeError, match="config must be a MUDDFormerConfig, got dict"):
        build_model({"dim": 4})
    with pytest.raises(TypeError, match="dtype must be a floating point"):
        build_model(MUDDFormerConfig(**SMALL), dtype=torch.int32)


@pytest.mark.compile
@pytest.mark.parametrize(("variant", "layers"), [("default", 2), ("stride-3x2-norms", 2)])
def test_compile_has_no_breaks_and_no_recompiles(variant: str, layers: int) -> None:
    torch._dynamo.reset()
    model = scramble(make(variant, n_layer=layers))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(some_ids(), some_ids()).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 9), (3, 24)):
            ids, targets = some_ids(*shape), some_ids(*shape)
            model.zero_grad()
            expected = torch.autograd.grad(model(ids, targets), list(model.parameters()))
            compiled(ids, targets).backward()
            for parameter, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.compile
@pytest.mark.slow
def test_compile_inductor() -> None:
    torch._dynamo.reset()
    model, ids = scramble(make(n_layer=2)), some_ids()
    expected = model(ids)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids), expected, rtol=1e-4, atol=1e-4)
