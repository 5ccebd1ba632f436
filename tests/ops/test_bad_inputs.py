"""Bad arguments of the operators: each is one clear error that names the argument, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from muddformer import ops

SOURCES, WAYS, WIDTH, HIDDEN, LEADING = 3, 4, 8, 16, (2, 5)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def aggregate_arguments() -> dict[str, Any]:
    return {"hiddens": [randn(*LEADING, WIDTH) for _ in range(SOURCES)], "weights": randn(*LEADING, WAYS, SOURCES)}


def backward_arguments() -> dict[str, Any]:
    return {
        "grad_outputs": [randn(*LEADING, WIDTH) for _ in range(WAYS)],
        "grad_hiddens": [randn(*LEADING, WIDTH) for _ in range(SOURCES)],
        **aggregate_arguments(),
    }


def weights_arguments() -> dict[str, Any]:
    return {
        "x": randn(*LEADING, WIDTH),
        "w1": randn(HIDDEN, WIDTH),
        "w2": randn(WAYS * SOURCES, HIDDEN),
        "prior": randn(WAYS, SOURCES),
        "scale": randn(WIDTH),
        "eps": 1e-6,
        "gelu_approximate": "none",
        "cap": 5.0,
    }


def weights_backward_arguments() -> dict[str, Any]:
    forward = weights_arguments()
    del forward["eps"]
    options = {name: forward.pop(name) for name in ("gelu_approximate", "cap")}
    return {
        "grad_weights": randn(*LEADING, WAYS, SOURCES),
        "grad_x": randn(*LEADING, WIDTH),
        **forward,
        "weights": randn(*LEADING, WAYS, SOURCES),
        "hidden": randn(*LEADING, HIDDEN),
        "factor": randn(*LEADING),
        **options,
        "wanted": (True,) * 5,
    }


def cross_entropy_arguments() -> dict[str, Any]:
    return {
        "hidden": randn(*LEADING, WIDTH),
        "weight": randn(HIDDEN, WIDTH),
        "targets": torch.zeros(LEADING, dtype=torch.int64),
        "bias": randn(HIDDEN),
        "reduction": "mean",
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "chunk": 3,
    }


def losses_arguments() -> dict[str, Any]:
    given = cross_entropy_arguments()
    tensors = {name: given[name] for name in ("hidden", "weight", "targets", "bias")}
    options = {name: given[name] for name in ("ignore_index", "label_smoothing", "z_loss", "chunk")}
    return {**tensors, "grad_losses": randn(*LEADING), **options, "wanted": (True,) * 3}


def linear_arguments() -> dict[str, Any]:
    return {
        "x": randn(*LEADING, WIDTH),
        "weight": randn(HIDDEN, WIDTH),
        "bias": randn(HIDDEN),
        "residual": randn(*LEADING, HIDDEN),
    }


def linear_backward_arguments() -> dict[str, Any]:
    given = linear_arguments()
    options = {"dtype": torch.float32, "wanted": (True,) * 3}
    return {"grad": given["residual"], "x": given["x"], "weight": given["weight"], **options}


def swiglu_arguments() -> dict[str, Any]:
    return {"gate": randn(*LEADING, WIDTH), "up": randn(*LEADING, WIDTH)}


def add_norm_arguments() -> dict[str, Any]:
    return {
        "x": randn(*LEADING, WIDTH),
        "residual": randn(*LEADING, WIDTH),
        "weight": randn(WIDTH),
        "bias": randn(WIDTH),
        "norm": "layer",
        "eps": 1e-6,
        "dtype": torch.float32,
    }


def add_norm_backward_arguments() -> dict[str, Any]:
    rows, row = randn(*LEADING, WIDTH), randn(*LEADING)
    return {
        "grad_sum": rows,
        "grad_normed": rows.clone(),
        "sum": rows.clone(),
        "weight": randn(WIDTH),
        "rstd": row,
        "mean": row.clone(),
        "norm": "layer",
        "x_dtype": torch.float32,
        "wanted": (True, True),
    }


def qk_arguments() -> dict[str, Any]:
    return {
        "q": randn(*LEADING, WAYS, WIDTH),
        "k": randn(*LEADING, WAYS, WIDTH),
        "cos": randn(LEADING[1], 2),
        "sin": randn(LEADING[1], 2),
        "q_weight": randn(WIDTH),
        "k_weight": randn(WIDTH),
        "eps": 1e-6,
    }


def qk_backward_arguments() -> dict[str, Any]:
    given = qk_arguments()
    grads = {f"grad_{name}": given[name].clone() for name in ("q", "k")}
    return {**grads, **given, "wanted": (True, True)}


def wrong_tensors(like: Tensor) -> Iterator[tuple[str, Any]]:
    """What may stand where a tensor of one shape, dtype and device is expected."""
    shape = like.shape
    for axis in range(len(shape)):
        for change in (1, -1):
            other = list(shape)
            other[axis] += change
            yield f"size{axis}{change:+d}", randn(*other)
    yield "one-dimension-more", randn(1, *shape)
    yield "one-dimension-less", randn(*shape[1:])
    yield "scalar", torch.tensor(1.0)
    yield "empty", torch.empty(0)
    for dtype in (
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float64,
        torch.bfloat16,
        torch.float16,
    ):
        yield str(dtype).removeprefix("torch."), torch.zeros(shape, dtype=dtype)
    yield "meta", torch.empty(shape, device="meta")
    yield "none", None
    yield "string", "a tensor"
    yield "number", 1.0
    yield "list", [1.0, 2.0]
    yield "sparse", like.detach().to_sparse()


OPTIONS = {
    "eps": [-1e-6, float("nan"), float("inf"), float("-inf"), "small", None, [1e-6]],
    "gelu_approximate": ["erf", "", "Tanh", "none ", None, 1, True],
    "cap": [0.0, -1.0, float("nan"), float("inf"), "ten", [1.0]],
    "wanted": ["all", None, 1.0],
    "norm": ["batch", "", "RMS", None, 1],
    "x_dtype": [torch.int64, torch.float64, None, "wide"],
    "reduction": ["average", "", "Mean", None, 1],
    "ignore_index": [1.5, "none", None],
    "label_smoothing": [-0.1, 1.1, float("nan"), "some", None],
    "z_loss": [-1e-3, float("nan"), float("inf"), "some", None],
    "chunk": [0, -1, 1.5, "all"],
    "dtype": [torch.float64, torch.int64, torch.bfloat16, "float32", None],
}


def cases() -> Iterator[Any]:
    """(op, arguments with one bad one)."""
    tables: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("depth_aggregate", aggregate_arguments),
        ("depth_aggregate_chained", aggregate_arguments),
        ("depth_aggregate_backward", backward_arguments),
        ("connection_weights", weights_arguments),
        ("connection_weights_chained", weights_arguments),
        ("connection_weights_forward", weights_arguments),
        ("connection_weights_backward", weights_backward_arguments),
        ("linear", linear_arguments),
        ("linear_forward", linear_arguments),
        ("linear_backward", linear_backward_arguments),
        ("linear_cross_entropy", cross_entropy_arguments),
        ("linear_cross_entropy_losses", losses_arguments),
        ("swiglu", swiglu_arguments),
        ("swiglu_backward", lambda: {"grad": randn(*LEADING, WIDTH), **swiglu_arguments()}),
        ("add_norm", add_norm_arguments),
        ("add_norm_backward", add_norm_backward_arguments),
        ("qk_norm_rotary", qk_arguments),
        ("qk_norm_rotary_backward", qk_backward_arguments),
    ]
    # Optional arguments aside: any number of ways, any leading shape.
    valid = {(f"depth_aggregate{c}", "weights", f"size2{n}") for c in ("", "_chained") for n in ("+1", "-1")}
    leading = ("size0+1", "size0-1", "size1+1", "size1-1", "one-dimension-more", "one-dimension-less")
    valid |= {(f"connection_weights{c}", "x", label) for c in ("", "_chained", "_forward") for label in leading}
    valid |= {("linear_cross_entropy", "hidden", "float64")}  # a float32 head goes with any hidden states
    valid |= {("linear", "x", dtype) for dtype in ("float64", "bfloat16", "float16")}  # and a float32 weight
    for op in ("linear_cross_entropy", "linear_cross_entropy_losses"):
        valid |= {(op, "targets", dtype) for dtype in ("int64", "int32")}
        valid |= {(op, "hidden", dtype) for dtype in ("bfloat16", "float16")}
    narrow = ("bfloat16", "float16")  # beside a float32 residual
    valid |= {("add_norm", "x", dtype) for dtype in narrow}
    valid |= {("add_norm_backward", "grad_normed", dtype) for dtype in narrow}
    valid |= {("add_norm", "bias", "none"), ("add_norm", "dtype", "None"), ("swiglu", "up", "none")}
    valid |= {("add_norm_backward", "grad_sum", "none")}
    valid |= {("qk_norm_rotary", name, f"size2{n}") for name in ("q", "k") for n in ("+1", "-1")}  # heads
    for op, arguments in tables:
        for name, value in arguments().items():
            if isinstance(value, Tensor):
                for label, wrong in wrong_tensors(value):
                    if (label == "none" and name in ("scale", "grad_x", "bias", "grad_losses", "residual")) or (
                        op,
                        name,
                        label,
                    ) in valid:
                        continue
                    yield pytest.param(op, {**arguments(), name: wrong}, id=f"{op}-{name}-{label}")
            elif isinstance(value, list):
                for label, wrong in wrong_tensors(value[1]):
                    if label == "none" and name.startswith("grad"):
                        continue  # an undefined gradient
                    entries = [value[0], wrong, *value[2:]]
                    yield pytest.param(op, {**arguments(), name: entries}, id=f"{op}-{name}[1]-{label}")
                yield pytest.param(op, {**arguments(), name: value[:-1]}, id=f"{op}-{name}-one-less")
                yield pytest.param(op, {**arguments(), name: [*value, value[0]]}, id=f"{op}-{name}-one-more")
                if name != "grad_hiddens":
                    yield pytest.param(op, {**arguments(), name: []}, id=f"{op}-{name}-empty")
                yield pytest.param(op, {**arguments(), name: 3}, id=f"{op}-{name}-number")
            else:
                for wrong in OPTIONS[name]:
                    if (op, name, str(wrong)) in valid:
                        continue
                    yield pytest.param(op, {**arguments(), name: wrong}, id=f"{op}-{name}-{wrong!r}")


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    values = [v for a in arguments.values() for v in (a if isinstance(a, list) else [a])]
    return [v for v in values if isinstance(v, Tensor) and not v.is_meta and v.layout == torch.strided]


@pytest.mark.parametrize(("op", "arguments"), list(cases()))
def test_bad_argument(op: str, arguments: dict[str, Any]) -> None:
    before = [t.clone() for t in tensors_of(arguments)]
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)) as error:
        getattr(torch.ops.muddformer, op)(*arguments.values())
    message = str(error.value)
    # Where two arguments disagree either may be named. The rest are sentences of the dispatcher, which name the op.
    assert any(message.startswith((f"{a}:", f"{a}[")) for a in arguments) or "muddformer::" in message, message
    assert "INTERNAL ASSERT" not in message
    for a, b in zip(before, tensors_of(arguments), strict=True):
        assert torch.equal(a, b)


def test_there_are_at_least_200() -> None:
    assert len(list(cases())) >= 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a["hiddens"].__setitem__(1, randn(2, 5, 9)),
            "hiddens[1]: expected shape [2, 5, 8] of hiddens[0], got [2, 5, 9]",
        ),
        (
            lambda a: a["hiddens"].__setitem__(2, a["hiddens"][2].double()),
            "hiddens[2]: expected dtype Float of hiddens[0], got Double",
        ),
        (
            lambda a: a["hiddens"].__setitem__(0, torch.zeros(2, 5, 8, dtype=torch.long)),
            "hiddens[0]: expected dtype float64",
        ),
        (lambda a: a.update(hiddens=[]), "hiddens: expected at least one hidden state, got none"),
        (
            lambda a: a.update(weights=randn(2, 5, 4, 2)),
            "C >= 1 and S = 3 (the number of hidden states), got [2, 5, 4, 2]",
        ),
    ],
)
def test_messages_of_depth_aggregate(change: Callable, message: str) -> None:
    arguments = aggregate_arguments()
    change(arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops.depth_aggregate(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": randn(16, 9)}, "w1: expected shape [K, D] with D = 8 of x, got [16, 9]"),
        ({"w2": randn(11, 16)}, "w2: expected shape [C*S, K] = [12, 16], got [11, 16]"),
        ({"prior": randn(12)}, "prior: expected shape [C, S] with C >= 1 and S >= 1, got [12]"),
        ({"eps": -1.0}, "eps: expected a finite number >= 0, got -1"),
        ({"gelu_approximate": "erf"}, "gelu_approximate: expected 'none' or 'tanh', got 'erf'"),
        ({"cap": 0.0}, "cap: expected a finite number > 0 or None, got 0"),
    ],
)
def test_messages_of_connection_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ops.connection_weights(**{**weights_arguments(), **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": randn(16, 9)}, "weight: expected shape [V, D] with V >= 1 and D = 8 of hidden, got [16, 9]"),
        ({"targets": torch.zeros(2, 4, dtype=torch.long)}, "targets: expected shape [2, 5] of hidden without D"),
        ({"targets": torch.zeros(2, 5)}, "targets: expected dtype int64 or int32, got Float"),
        ({"bias": randn(15)}, "bias: expected shape [V] with V = 16 of weight, got [15]"),
        ({"reduction": "average"}, "reduction: expected 'mean', 'sum' or 'none', got 'average'"),
        ({"label_smoothing": 2.0}, "label_smoothing: expected a number from 0 to 1, got 2"),
        ({"z_loss": -1.0}, "z_loss: expected a finite number >= 0, got -1"),
        ({"chunk": 0}, "chunk: expected at least 1 token or None, got 0"),
    ],
)
def test_messages_of_linear_cross_entropy(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        ops.linear_cross_entropy(**{**cross_entropy_arguments(), **change})
    assert message in str(error.value)
