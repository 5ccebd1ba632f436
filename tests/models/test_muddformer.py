"""The models: every variant against a naive formulation of the specification, and how they live with torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.models import SMALL, VARIANTS, make, scramble, some_ids
from helpers.naive_model import check_against_naive
from muddformer import MUDDFormerConfig, build_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_naive(variant: str) -> None:
    check_against_naive(variant)


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


@pytest.mark.parametrize("variant", ["default", "pythia", "static", "pre-post", "ways-qkv", "cap", "residual-float32"])
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
