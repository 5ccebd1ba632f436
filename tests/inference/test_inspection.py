"""What ``muddformer inspect`` measures."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from helpers.models import VARIANTS, make, scramble, some_ids
from muddformer.inference.inspection import inspect_model
from muddformer.models.layers import apply_rotary


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant):
    model = scramble(make(variant)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inspection = inspect_model(model, [some_ids(), some_ids()])
    layers = model.config.n_layer
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert inspection.plan == model.plan
    assert inspection.sinks.shape == (layers, model.config.n_head) and inspection.history_rms.shape == (layers + 1,)
    for i, sources in inspection.plan.items():
        shape = (len(inspection.ways[i]), len(sources))
        assert inspection.weight_means[i].shape == inspection.weight_stds[i].shape == shape
    for matrix in inspection.similarities.values():
        torch.testing.assert_close(matrix.diagonal(), torch.ones(layers))
        torch.testing.assert_close(matrix, matrix.T)
    json.dumps(inspection.to_dict())


@torch.no_grad()
def test_weights_of_all_batches():
    model, weights = scramble(make()), {i: [] for i in make().plan}
    batches = [some_ids(2, 7), some_ids(3, 4)]
    handles = [
        da.register_forward_pre_hook(
            lambda da, args, i=i: weights[i].append(da.connection_weights(args[0][-1], args[1])[0].flatten(0, -3))
        )
        for i, da in zip(model.plan, model.dynamic_dense, strict=True)
    ]
    for ids in batches:
        model(ids)
    for handle in handles:
        handle.remove()
    inspection = inspect_model(model, batches)
    for i, values in weights.items():
        torch.testing.assert_close(inspection.weight_means[i], torch.cat(values).mean(0))
        torch.testing.assert_close(inspection.weight_stds[i], torch.cat(values).std(0, correction=0))


@torch.no_grad()
@pytest.mark.parametrize("length", [7, 300])
def test_sinks_and_norms_of_the_first_block(length):
    model, ids = scramble(make(block_size=512), 0.5), some_ids(2, length)
    x, block = model.tok_embeddings(ids), model.layers[0]
    y = block.attention_norm(x)
    q, k = (w(y).unflatten(-1, (-1, model.config.head_dim)) for w in (block.attention.wq, block.attention.wk))
    q, k = block.attention.q_norm(q), block.attention.k_norm(k)
    q, k = (apply_rotary(z, *model.rotary(length)).transpose(1, 2) for z in (q, k))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(later, float("-inf")).softmax(-1)[:, :, 1:, 0].mean((0, 2))
    inspection = inspect_model(model, [ids])
    torch.testing.assert_close(inspection.sinks[0], shares)
    torch.testing.assert_close(inspection.history_rms[0], x.square().mean().sqrt())


def test_a_fresh_model_passes_the_newest_state_on():
    inspection = inspect_model(make(), [some_ids()])
    for mean, std in zip(inspection.weight_means.values(), inspection.weight_stds.values(), strict=True):
        newest = F.one_hot(torch.tensor(mean.shape[1] - 1), mean.shape[1])
        torch.testing.assert_close(mean, newest.expand_as(mean).float())
        assert std.max() < 1e-6


@pytest.mark.parametrize(
    ("batches", "words"),
    [([], "at least one batch"), ([torch.zeros(1, 1).long()], "T of at least 2"), ([torch.zeros(4).long()], "B, T")],
)
def test_bad_batches(batches, words):
    with pytest.raises(ValueError, match=words):
        inspect_model(make(), batches)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="model must be a MUDDFormer, got Linear"):
        inspect_model(torch.nn.Linear(2, 2), [some_ids()])
