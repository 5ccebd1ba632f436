"""An experiment: a history in float8, of the model type ``float8-history``, simulated by rounding.

All sources of an aggregation but the newest are rounded to float8 (e4m3: 4 bits of exponent, 3 of mantissa) with a
scale for each token, so that its largest value is the format's. The backward of the connection weights reads rounded
values too; gradients of hidden states pass through as they are. Nothing gets smaller or faster by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muddformer.models import FAMILIES, Family, MUDDFormer, MUDDFormerConfig
from muddformer.models.config import FAMILY_DEFAULTS
from muddformer.nn import DepthAggregation

__all__ = ["Float8History", "rounded"]

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max


def rounded(x: Tensor) -> Tensor:
    """The values of x [..., D] in float8 with a scale for each token, in the dtype of x; its gradient is that of x."""
    values = x.detach().float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    near = ((values / scale).clamp(-_LARGEST, _LARGEST).to(_FORMAT).float() * scale).to(x.dtype)
    return near + (x - x.detach())


class _Aggregation(DepthAggregation):
    def forward(self, hiddens: Sequence[Tensor], *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        return super().forward([*map(rounded, hiddens[:-1]), hiddens[-1]], *args, **kwargs)


class Float8History(MUDDFormer):
    """A model whose aggregations read older hidden states in float8."""

    aggregation_class = _Aggregation


FAMILY_DEFAULTS["float8-history"] = FAMILY_DEFAULTS["muddformer"]
FAMILIES["float8-history"] = Family(MUDDFormerConfig, Float8History)
