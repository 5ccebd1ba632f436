"""What the transformers backends of vLLM and SGLang ask of a model, as far as it can be asked without them."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.hf import small
from helpers.models import some_ids

try:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
except ImportError:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES


class Replaced(nn.Module):
    """A linear layer that keeps its weight to itself, as a server's quantised or sharded one does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.hidden = [linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden[0](x)


@pytest.mark.parametrize("variant", ["default", "pythia"])
def test_no_module_reads_the_weight_of_another(variant: str) -> None:
    model, ids = small(variant), some_ids()
    with torch.no_grad():
        expected = model(ids).logits
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Replaced(child))
        found = model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        model.train()
        assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("flat", [False, True])
def test_kwargs_reach_the_attention_function(flat: bool) -> None:
    """Which may return what it was to return, or [B * T, H * E] as vLLM's does."""
    seen = []

    def attention(module, q, k, v, mask, **kwargs):
        seen.append(
            (module.layer_idx, module.is_causal, kwargs["instances"][module.layer_idx], q.shape, kwargs["scaling"])
        )
        kwargs.pop("instances")
        y, weights = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        return y.reshape(-1, y.shape[-2] * y.shape[-1]) if flat else y, weights

    AttentionInterface.register("server", attention)
    model, ids = small("gqa"), some_ids(1)
    with torch.no_grad():
        expected = model(ids).logits
    model.config._attn_implementation = "server"
    blocks, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    with torch.no_grad():
        found = model(ids, position_ids=torch.arange(7)[None], instances=dict(enumerate("abcdefgh")), use_cache=False)
    assert torch.equal(found.logits, expected)
    shape, scale = (1, heads, 7, 32 // heads), (32 // heads) ** -0.5
    assert [(i, causal, name, tuple(size)) for i, causal, name, size, _ in seen] == [
        (i, True, "abcdefgh"[i], shape) for i in range(blocks)
    ]
    assert all(abs(entry[4] - scale) < 1e-12 for entry in seen)
    assert model._supports_attention_backend


def test_positions_of_one_flat_batch() -> None:
    """Positions come from the caller: tokens that start at another place are rotated by it."""
    model, ids = small(), some_ids(1)
    with torch.no_grad():
        expected = model(ids).logits
        shifted = model(ids, position_ids=torch.arange(3, 10)[None], use_cache=False).logits
        gaps = model(ids, position_ids=torch.arange(0, 14, 2)[None], use_cache=False).logits
    torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-4)  # rotary positions are relative
    assert not torch.allclose(gaps, expected, rtol=1e-3, atol=1e-4)


def test_a_flat_batch_may_be_longer_than_a_sequence() -> None:
    model = small()
    most = model.config.block_size
    ids, positions = some_ids(1, most + 6), torch.cat([torch.arange(most), torch.arange(6)])[None]
    with torch.no_grad():
        flat = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(flat[:, :most], model(ids[:, :most]).logits, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match=f"position_ids must be below block_size={most}, got {most + 5}"):
            model(ids, position_ids=torch.arange(most + 6)[None], use_cache=False)


def test_the_head_by_the_name_that_a_server_looks_for() -> None:
    """vLLM makes a base model of AutoModel and a head of its own, and renames weights as transformers would."""
    model = small()
    base = AutoModel.from_config(model.config)
    (renaming,) = get_checkpoint_conversion_mapping(type(base).__name__)
    renamed = {renaming.rename_source_key(name)[0] for name in model.state_dict()}
    assert renamed == {*base.state_dict(), "lm_head.weight"}
    for name in (type(model).__name__, model.config.model_type):  # our own keep theirs
        assert get_checkpoint_conversion_mapping(name) is None


@pytest.mark.parametrize("variant", ["default", "pythia"])
def test_the_tensor_parallel_plan_is_complete(variant: str) -> None:
    model = small(variant)
    plan = model.config.base_model_tp_plan
    blocks = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in name}
    assert blocks == {name for name in blocks for pattern in plan if fnmatch.fnmatch(name, pattern)}
    styles = {name.split(".")[-1]: plan[f"layers.*.attention.{name}"] for name in ("wq", "wk", "wv", "wo")}
    assert styles == {"wq": "colwise", "wk": "colwise", "wv": "colwise", "wo": "rowwise"}
    assert {*plan.values(), *model._tp_plan.values()} <= set(ALL_PARALLEL_STYLES)
    for layer in model.layers:
        names = dict(layer.attention.named_children())
        assert all(type(names[name]) is nn.Linear for name in ("wq", "wk", "wv", "wo"))
    assert plan.keys() <= model._tp_plan.keys()
    assert type(model)._tp_plan.keys() == {"output"}  # of a class, which transformers 5.0 leaves out, for every model
