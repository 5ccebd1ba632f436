"""What is no tensor, list or number where one is expected: a TypeError that names it; and bounds beyond a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from muddformer import ops
from muddformer.nn import DepthAggregation

X = [torch.randn(2, 8) for _ in range(3)]
W, W1, W2, PRIOR = torch.randn(2, 2, 3), torch.randn(6, 8), torch.randn(6, 6), torch.randn(2, 3)
GENERATOR = {"x": X[0], "w1": W1, "w2": W2, "prior": PRIOR, "scale": None, "eps": 1e-6, "cap": None}
NORMED = {"hiddens": X, "weights": W, "norm_weights": [None, None], "eps": 1e-6, "pre_weight": None, "deferral": None}
FUNCTIONS: dict[Any, dict[str, Any]] = {
    ops.depth_aggregate: {"hiddens": X, "weights": W},
    ops.depth_aggregate_chained: {"hiddens": X, "weights": W, "deferral": None},
    ops.depth_aggregate_norm_chained: NORMED,
    ops.connection_weights: GENERATOR,
    ops.connection_weights_chained: GENERATOR,
    ops.depth_aggregation_step: {"hiddens": X, "w1": W1, "w2": W2, "prior": PRIOR, "norms": None},
    ops.defer_gradients: {"hiddens": X, "layers": [(2, 3)]},
    ops.fuses_norms: {"x": X[0], "sources": 3, "ways": 2},
    ops.fuses_step: {"newest": X[0]},
    DepthAggregation(8, 3, 2): {"hiddens": X, "prior": PRIOR},
}
WRONG = {"None": None, "number": 1.5, "array": np.zeros((2, 8)), "text": "x", "object": object()}


def cases() -> list[Any]:
    result = []
    for function, arguments in FUNCTIONS.items():
        own = getattr(function, "__name__", "DepthAggregation")
        for name, value in arguments.items():
            optional = value is None or name in ("norm_weights", "prior", "w1", "w2")
            for kind, wrong in WRONG.items():
                number = kind == "number" and name in ("eps", "cap")
                if not (number or (kind == "None" and optional)):
                    result.append(pytest.param(function, {**arguments, name: wrong}, name, id=f"{own}-{name}-{kind}"))
                if isinstance(value, list) and not (kind == "None" and optional):
                    entries = {**arguments, name: [*value[:-1], wrong]}
                    result.append(pytest.param(function, entries, name, id=f"{own}-{name}[-1]-{kind}"))
    return result


@pytest.mark.parametrize(("function", "arguments", "name"), cases())
def test_wrong_kind(function: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\b.*(expected|must be)"):
        function(**arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cap_beyond_the_dtype(dtype: torch.dtype) -> None:
    x, w1, w2, prior = (t.to(dtype) for t in (X[0], W1, W2, PRIOR))
    most = torch.finfo(dtype).max
    for call in (ops.connection_weights, ops.connection_weights_chained):
        assert call(x, w1, w2, prior, cap=most)[0].isfinite().all()
        with pytest.raises(ValueError, match="cap: expected at most"):
            call(x, w1, w2, prior, cap=most * 1.001)
        with pytest.raises(ValueError, match="cap: expected at least"):
            call(x, w1, w2, prior, cap=1e-46)
    with pytest.raises(ValueError, match="cap: expected at most"):
        ops.depth_aggregation_step([x] * 3, w1, w2, prior, cap=most * 1.001)
    static = DepthAggregation(8, 3, 2, dynamic=False, cap=most * 1.001, dtype=dtype)
    with pytest.raises(ValueError, match="cap must be at most"):
        static([x] * 3)


def test_eps_beyond_float32() -> None:
    with pytest.raises(ValueError, match="eps: expected at most"):
        ops.connection_weights(X[0], W1, W2, PRIOR, eps=1e39)
