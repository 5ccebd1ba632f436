"""FLOPs of models by torch.utils.flop_counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from muddformer import MUDDFormerConfig, build_model, ops

FIELDS = {"vocab_size": 61, "block_size": 16, "n_layer": 4, "n_head": 2, "dim": 32, "intermediate_size": 256}
TOKENS = 2 * 16


def counted(model: torch.nn.Module, backward: bool) -> int:
    ids = torch.arange(TOKENS).reshape(2, 16)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, ids)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"pre_norm": True, "post_norm": "residual"}, {"flush_interval": 2}], ids=str)
def test_connections_count(options: dict) -> None:
    model = build_model(MUDDFormerConfig(**FIELDS, ffn_reallocation=False, **options))
    plain = build_model(model.config.plain_twin())
    mixing = sum(da.num_ways * da.sources * da.dim for da in model.dynamic_dense)
    generating = sum(da.w1.weight.numel() + da.w2.weight.numel() for da in model.dynamic_dense)
    assert counted(model, False) - counted(plain, False) == 2 * TOKENS * (mixing + generating)
    # A backward has two products for each of the forward.
    assert counted(model, True) - counted(plain, True) == 6 * TOKENS * (mixing + generating)


def test_a_step_of_decoding_counts() -> None:
    hiddens = [torch.randn(3, 1, 8) for _ in range(5)]
    w1, w2, prior = torch.randn(20, 8), torch.randn(10, 20), torch.randn(2, 5)
    for matrices, made in (((w1, w2), w1.numel() + w2.numel()), ((None, None), 0)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ops.depth_aggregation_step(hiddens, *matrices, prior)
        assert counter.get_total_flops() == 2 * 3 * (made + 8 * 2 * 5)
