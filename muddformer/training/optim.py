"""AdamW groups and the learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..nn import DepthAggregation, MUDDStack
from .settings import TrainSettings

__all__ = ["learning_rate", "make_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: matrices with ``weight_decay``, everything else with none.

    Matrices are parameters of two or more dimensions, the output head among them. Without decay stay embeddings (and a
    head tied to them: rare tokens would decay with hardly any gradient to restore them), the parameters of the MUDD
    connections (static priors are matrices in shape only), norms and biases.
    """
    kept = {id(parameter) for parameter in model.parameters() if parameter.ndim < 2}
    for module in model.modules():
        if isinstance(module, nn.Embedding | DepthAggregation):
            kept.update(map(id, module.parameters()))
        elif isinstance(module, MUDDStack):
            kept.update(map(id, module.connection_parameters()))
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) in kept], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, with torch's fused kernels where it has them."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    groups = parameter_groups(model, settings.weight_decay)
    return torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=fused)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Learning rate of update ``step`` = 1 .. ``steps``: linear warm-up to the peak, then a cosine to the lowest."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    share = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * share
