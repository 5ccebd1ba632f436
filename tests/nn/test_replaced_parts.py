"""What a module owns is not bypassed: hooks, adapters, other classes and quantised weights of its parts have effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from muddformer import MUDDFormerConfig, build_model
from muddformer.nn import RMSNorm


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as adapters are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += self.b @ self.a
        return self.base


def make(**options: object) -> nn.Module:
    torch.manual_seed(0)
    fields = {"vocab_size": 31, "block_size": 8, "n_layer": 3, "n_head": 2, "dim": 16, "intermediate_size": 256}
    model = build_model(MUDDFormerConfig(**fields, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.arange(16).reshape(2, 8)
    return model(ids, ids)


OPTIONS = [{}, {"pre_norm": True, "post_norm": "residual"}, {"cap": 3.0, "model_type": "muddpythia"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["w1", "w2"])
def test_adapters_train_and_merge(options: dict, name: str) -> None:
    model = make(**options)
    adapters = []
    for da in model.dynamic_dense:
        setattr(da, name, Adapted(getattr(da, name)))
        adapters.append(getattr(da, name))
    adapted = loss_of(model)
    adapted.backward()
    assert all(p.grad.abs().sum() > 0 for adapter in adapters for p in (adapter.a, adapter.b))
    for da in model.dynamic_dense:
        setattr(da, name, getattr(da, name).merged())
    torch.testing.assert_close(loss_of(model), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parts_that_are_called_compute_the_same(options: dict) -> None:
    fused, called = make(**options), make(**options)
    calls = []
    for da in called.dynamic_dense:
        for part in (da.w1, da.w2, da.norm, da.pre_norm, *(da.post_norms or ())):
            if part is not None:
                part.register_forward_hook(lambda *_: calls.append(1))
    one, two = loss_of(fused), loss_of(called)
    assert len(calls) >= 2 * len(called.dynamic_dense)
    torch.testing.assert_close(one, two)
    one.backward(), two.backward()
    for (name, a), b in zip(fused.named_parameters(), called.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_backward_hooks_and_parametrisations() -> None:
    model = make()
    seen = []
    model.dynamic_dense[0].w1.register_full_backward_hook(lambda *_: seen.append("backward"))
    loss_of(model).backward()
    assert seen == ["backward"]

    class Hundredfold(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 100

    plain = loss_of(make())
    for part in ("w1", "w2"):
        model = make()
        parametrize.register_parametrization(getattr(model.dynamic_dense[0], part), "weight", Hundredfold())
        assert (loss_of(model) - plain).abs() > 1e-4
    model = make(post_norm="residual")
    before = loss_of(model)
    model.dynamic_dense[0].post_norms[-1] = nn.LayerNorm(16)
    assert (loss_of(model) - before).abs() > 1e-4


@pytest.mark.parametrize("change", ["hook", "norm"])
def test_norms_of_streams(change: str) -> None:
    model = make()
    before = loss_of(model)
    norms = model.layers[1].attention_norms
    if change == "hook":
        norms[2].register_forward_hook(lambda _, __, y: y * 3)
    else:
        norms[2] = nn.Sequential(RMSNorm(16), nn.Tanh())
    assert (loss_of(model) - before).abs() > 1e-5


def int8_weights(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def int8_modules(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.bias is None:
                setattr(module, name, Int8Linear(child))
    return model


@pytest.mark.parametrize("quantise", [int8_weights, int8_modules])
def test_quantised_models_run_and_are_not_saved(quantise: Callable[..., nn.Module], tmp_path: Path) -> None:
    exact, model = loss_of(make()), quantise(make()).eval()
    with torch.no_grad():
        assert abs(loss_of(model) - exact).item() < 0.1
    with pytest.raises(ValueError, match=r"model must have .* to be saved.* before it is\s+quantised"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Scaled(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: Tensor) -> Tensor:
        return 1.5 * self.base(ids)


def test_an_embedding_without_a_weight_of_its_own() -> None:
    model = make()
    expected = loss_of(model)
    model.tok_embeddings = Scaled(model.tok_embeddings)
    assert loss_of(model).isfinite() and not torch.equal(loss_of(model), expected)
    with torch.no_grad():
        model.tok_embeddings.base.weight.div_(1.5)
    torch.testing.assert_close(loss_of(model), expected)
