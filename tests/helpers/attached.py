"""Small models of transformers with MUDD connections."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from muddformer.hf import attach

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Llama": {**GROUPED, "tie_word_embeddings": True},
    "Mistral": {**GROUPED, "sliding_window": 6},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "GPTNeoX": {},
}
EXACT = {"rtol": 0, "atol": 0}
every_family = pytest.mark.parametrize("family", FAMILIES)
two_families = pytest.mark.parametrize("family", ["Qwen3", "GPTNeoX"])  # separate projections, and a fused one


def make(family: str, **sizes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


def stir(model: PreTrainedModel) -> PreTrainedModel:
    """Connections as if they had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.base_model.connections.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def attached(family: str, **fields: object) -> PreTrainedModel:
    return stir(attach(make(family), **fields))


def tokens(batch: int = 2, length: int = 10) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, ids: Tensor, call: nn.Module | None = None) -> dict[str, Tensor]:
    """The gradients of a training step, and its loss."""
    model.train().zero_grad()
    loss = (model if call is None else call)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    names = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **names}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
