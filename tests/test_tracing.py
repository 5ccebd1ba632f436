"""torch.jit.trace and torch.onnx.export of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from helpers.models import make, scramble, some_ids
from muddformer import _onnx, ops


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes, which a trace keeps
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("variant", ["default", "flush-3-norms"])
def test_jit_trace_passes_its_own_check(variant: str) -> None:
    model, ids, more = scramble(make(variant, n_layer=2), 0.1), some_ids(), some_ids(3, 11)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, (ids,))(more), model(more))
    traced = torch.jit.trace(model, (ids,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(more).square().mean(), parameters, allow_unused=True)
    actual = torch.autograd.grad(traced(more).square().mean(), parameters, allow_unused=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def tensors(value: Tensor | Sequence) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for part in value for x in tensors(part)]


def test_formulas_for_onnx_are_the_operators() -> None:
    """Values, shapes, dtypes and strides: tracing with symbolic sizes reads the formulas too."""
    hiddens, weights, norm = [torch.randn(2, 3, 8) for _ in range(3)], torch.randn(2, 3, 2, 3), torch.randn(8)
    generator = (torch.randn(12, 8), torch.randn(6, 12), torch.randn(2, 3), norm, 1e-6, "tanh")
    targets = torch.tensor([[0, 4, -100], [1, 1, 2]])
    calls = [
        ("depth_aggregate", hiddens, weights),
        ("connection_weights", hiddens[0], *generator, 2.0),
        ("linear_forward", hiddens[0], torch.randn(5, 8), torch.randn(5), torch.randn(2, 3, 5)),
        ("depth_aggregation_step", hiddens, *generator, None, [norm, None], [], "rms", 1e-6),
        ("depth_aggregation_step", hiddens, None, None, generator[2], None, 1e-6, "none", 2.0, [], [], "none", 1e-6),
    ]
    for pre in (None, norm):
        for post in (None, norm):
            for kind, bias in (("rms", None), ("layer", norm)):
                norms = ([norm, None], [bias, None], kind, 1e-6, post is not None or bias is None, pre, post)
                calls.append(("depth_aggregate_norm_forward", hiddens, weights, *norms))
    for grad in (None, torch.randn(2, 3)):
        for bias in (None, torch.randn(5)):
            wanted = [True, True, bias is not None]
            head = (hiddens[0], torch.randn(5, 8), targets, bias, grad)
            calls.append(("linear_cross_entropy_losses", *head, -100, 0.1, 0.01, None, wanted))
    x, residual, bias = *hiddens[:2], torch.randn(8)
    calls += [("swiglu", x, residual), ("swiglu", x, None)]
    calls.append(("add_norm_forward", x, residual, norm, None, "rms", 1e-6, None))
    calls.append(("add_norm_forward", x, residual, norm, bias, "layer", 1e-6, torch.float32))
    heads = [torch.randn(2, 3, count, 8) for count in (4, 2)]
    tables = [torch.randn(3, 2), torch.randn(3, 2)]
    calls += [("qk_norm_rotary", *heads, *tables, norm, bias, 1e-6), ("qk_norm_rotary", *heads, *tables)]
    assert {name for name, *_ in calls} == _onnx.FORMULAS.keys()
    with torch.no_grad():
        for name, *arguments in calls:
            expected = tensors(getattr(torch.ops.muddformer, name)(*arguments))
            actual = tensors(_onnx.FORMULAS[name](*arguments))
            torch.testing.assert_close(actual, expected, check_stride=True)


def run(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, named)]


class Operators(nn.Module):
    def forward(self, a: Tensor, b: Tensor, x: Tensor, w1: Tensor, w2: Tensor, prior: Tensor, norm: Tensor) -> list:
        with torch.no_grad():
            weights, x = ops.connection_weights_chained(x, w1, w2, prior, scale=norm, cap=2.0)
            norms = ops.StreamNorms([norm, None], [norm, None], "layer")
            step = ops.depth_aggregation_step([a, b, x], w1, w2, prior, norms=norms)
            norms = norms._replace(add_newest=True, pre_weight=norm, post_weight=norm)
            streams, hiddens = ops.depth_aggregate_norm_chained([a, b, x], weights, norms)
            return [*step, *streams, *hiddens, *ops.depth_aggregate(hiddens, weights)]


@pytest.mark.slow
def test_onnx_export(tmp_path: Path) -> None:
    path, sizes = tmp_path / "model.onnx", {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=24)}
    model, ids = scramble(make("pre-post", n_layer=2), 0.1).eval(), some_ids()
    torch.onnx.export(model, (ids,), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    for given in (ids, some_ids(3, 11)):
        torch.testing.assert_close(run(path, [given]), [model(given).detach()], rtol=1e-4, atol=1e-5)
    inputs = [*(torch.randn(2, 3, 8) for _ in range(3)), torch.randn(12, 8), torch.randn(6, 12), torch.randn(2, 3)]
    inputs.append(torch.randn(8))
    torch.onnx.export(Operators().eval(), tuple(inputs), path, dynamo=True, verbose=False)
    torch.testing.assert_close(run(path, inputs), Operators()(*inputs), rtol=1e-4, atol=1e-5)
    # The formulas are in PyTorch's table from here on, where tracing with symbolic sizes reads them.
    model = scramble(make(n_layer=1), 0.1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    expected = torch.autograd.grad(model(ids, ids), list(model.dense_bs))
    torch.testing.assert_close(torch.autograd.grad(compiled(ids, ids), list(model.dense_bs)), expected)
