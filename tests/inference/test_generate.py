"""Generation: the cache against full forward passes, sampling, arguments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import muddformer
from helpers.models import SMALL, make, scramble
from muddformer import MUDDFormer
from muddformer.inference import generate_stream, sample
from muddformer.models import KVCache

VARIANTS = [
    "default",
    "plain",
    "pythia",
    "denseformer",
    "stride-2x2",
    "stride-3x2-norms",
    "window-1",
    "gqa",
    "mqa-tied",
]


def scrambled(variant: str = "default") -> MUDDFormer:
    """A model whose parameters are all off their initial values."""
    return scramble(make(variant, n_layer=3))


def prompt(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_equals_full_forward(variant: str) -> None:
    # In float64: random weights amplify the rounding of products of other shapes.
    model, ids = scrambled(variant).double(), prompt(length=12)
    expected = model(ids)
    cache = KVCache(model.config, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        # The prompt, single tokens, and several at once.
        logits = torch.cat([model(part, cache=cache) for part in ids.split([5, 1, 1, 4, 1], dim=1)], dim=1)
    assert cache.used == 12
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_full_forward(variant: str) -> None:
    model, ids = scrambled(variant), prompt()
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    for temperature in (0, 0.0, None):
        assert torch.equal(muddformer.generate(model, ids, max_new_tokens=8, temperature=temperature), expected)
    steps = list(generate_stream(model, ids, max_new_tokens=8))
    assert [step.shape for step in steps] == [(3, 1)] * 8
    assert torch.equal(torch.cat([ids, *steps], dim=1), expected)


def test_a_step_runs_on_one_token() -> None:
    model, lengths = scrambled(), []
    model.layers[1].register_forward_pre_hook(lambda _, streams: lengths.append(streams[0].shape[1]))
    muddformer.generate(model, prompt(), max_new_tokens=6)
    assert lengths == [5, 1, 1, 1, 1, 1]


def test_shape_dtype_and_no_gradients() -> None:
    model, ids = scrambled(), prompt().int()
    out = muddformer.generate(model, ids, max_new_tokens=19)
    assert out.shape == (3, 24) and out.dtype == torch.int32 and not out.requires_grad
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(muddformer.generate(model, ids, max_new_tokens=0), ids)
    assert muddformer.generate(model.bfloat16(), ids, max_new_tokens=2).shape == (3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert muddformer.generate(scrambled(), ids, max_new_tokens=2).shape == (3, 7)


def test_seed_decides() -> None:
    model, ids = scrambled(), prompt()

    def draw(seed: int | None, **options) -> Tensor:
        return muddformer.generate(model, ids, max_new_tokens=12, seed=seed, **{"temperature": 1.0, **options})

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(5, top_k=3, top_p=0.8), draw(5, top_k=3, top_p=0.8))
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    first = draw(None)
    torch.manual_seed(4)
    assert torch.equal(first, draw(None))
    greedy = muddformer.generate(model, ids, max_new_tokens=12)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-12}, {"temperature": 1e-300}):
        assert torch.equal(draw(1, **options), greedy)


def test_sampling_distribution() -> None:
    logits = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log().expand(20000, 5)
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
        drawn = sample(logits, temperature, top_k, top_p, generator)
        assert drawn.shape == (20000, 1)
        return drawn.flatten().bincount(minlength=5) / 20000

    for options, expected in [
        ({}, [0.1, 0.5, 0.2, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.01, 0.25, 0.04, 0.0225, 0.0025]),
        ({"top_k": 2}, [0, 0.5, 0.2, 0, 0]),
        ({"top_k": 9}, [0.1, 0.5, 0.2, 0.15, 0.05]),
        ({"top_p": 0.6}, [0, 0.5, 0.2, 0, 0]),
        ({"top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.2, 0.15, 0.05]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.5, 0.2, 0, 0]),  # top_p counts what top_k leaves: 0.59, 0.24, 0.18
    ]:
        expected = torch.tensor(expected) / sum(expected)
        torch.testing.assert_close(frequencies(**options), expected, rtol=0, atol=0.02)


def test_equal_logits_keep_exactly_top_k() -> None:
    drawn = sample(torch.zeros(500, 50), 1.0, 3, None, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {0, 1, 2}


def test_end_of_sequence() -> None:
    model, ids = scrambled(), prompt()
    free = muddformer.generate(model, ids, max_new_tokens=10)
    end = free[0, 7].item()
    out = muddformer.generate(model, ids, max_new_tokens=10, eos_token_id=end)
    for row, expected in zip(out.tolist(), free.tolist(), strict=True):
        new = expected[5:]
        stop = new.index(end) + 1 if end in new else len(new)
        assert row[5 : 5 + stop] == new[:stop] and set(row[5 + stop :]) <= {end}
    alone = muddformer.generate(model, ids[:1], max_new_tokens=10, eos_token_id=end)
    assert alone.shape[1] == 5 + free[0, 5:].tolist().index(end) + 1


IDS = torch.zeros(2, 5, dtype=torch.int64)
BAD = [
    ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a MUDDFormer, got Linear"),
    ({"model": None}, TypeError, "model must be a MUDDFormer, got NoneType"),
    ({"input_ids": [[1]]}, TypeError, "input_ids must be a tensor, got list"),
    ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
    ({"input_ids": IDS[0]}, ValueError, "input_ids must be .* got shape"),
    ({"input_ids": IDS[:, :0]}, ValueError, r"not empty, got shape \[2, 0\]"),
    ({"input_ids": IDS[:0]}, ValueError, r"not empty, got shape \[0, 5\]"),
    ({"input_ids": IDS - 1}, IndexError, "input_ids must be from 0 to vocab_size - 1 = 60, got -1 to -1"),
    ({"input_ids": IDS + 61}, IndexError, "input_ids must be .* got 61 to 61"),
    ({"input_ids": IDS.repeat(1, 5)}, ValueError, r"must fit into block_size=24, got 25 \+ 4"),
    ({"max_new_tokens": 20}, ValueError, r"must fit into block_size=24, got 5 \+ 20"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be from 0 to .* got -1"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, got 2.0"),
    ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an integer, got True"),
    ({"temperature": -0.5}, ValueError, "temperature must be more than 0"),
    ({"temperature": float("inf")}, ValueError, "temperature must be more than 0 and finite, got inf"),
    ({"temperature": float("nan")}, ValueError, "temperature .* got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"temperature": False}, TypeError, "temperature must be a number, got False"),
    ({"top_k": 0}, ValueError, "top_k must be from 1"),
    ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
    ({"top_p": 0.0}, ValueError, "top_p must be more than 0 and at most 1, got 0.0"),
    ({"top_p": 1.01}, ValueError, "top_p must be more than 0 and at most 1, got 1.01"),
    ({"top_p": float("nan")}, ValueError, "top_p .* got nan"),
    ({"top_p": "0.9"}, TypeError, "top_p must be a number"),
    ({"seed": -1}, ValueError, "seed must be from 0"),
    ({"seed": 1.0}, TypeError, "seed must be an integer"),
    ({"seed": 2**64}, ValueError, "seed must be from 0"),
    ({"eos_token_id": 61}, ValueError, "eos_token_id must be from 0 to 60, got 61"),
    ({"eos_token_id": -1}, ValueError, "eos_token_id must be from 0 to 60, got -1"),
    ({"eos_token_id": [1]}, TypeError, "eos_token_id must be an integer"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_arguments(arguments: dict, error: type[Exception], match: str) -> None:
    arguments = {"model": scrambled(), "input_ids": IDS, "max_new_tokens": 4, **arguments}
    for call in (muddformer.generate, generate_stream):  # both before the first token
        with pytest.raises(error, match=match):
            call(**arguments)


def test_a_model_that_is_not_causal() -> None:
    model = muddformer.build_model(scrambled().config.replace(causal=False))
    with pytest.raises(ValueError, match="model must have causal=True to generate"):
        generate_stream(model, IDS, max_new_tokens=2)


def test_bad_cache() -> None:
    model = scrambled()
    with pytest.raises(TypeError, match="cache must be a KVCache, such as new_cache\\(\\) makes, got str"):
        model(IDS, cache="x")
    with pytest.raises(ValueError, match="length must be from 1 to 24, got 25"):
        KVCache(model.config, 2, 25)
    with pytest.raises(ValueError, match="batch_size must be from 1"):
        KVCache(model.config, 0, 8)
    cache = KVCache(model.config, 2, 8)
    with pytest.raises(RuntimeError, match="a KVCache works only without gradients"):
        model(IDS, cache=cache)
    other = muddformer.build_model(model.config.replace(n_layer=1, ffn_reallocation=False))
    longer = muddformer.build_model(model.config.replace(block_size=48))
    fewer = muddformer.build_model(model.config.replace(n_kv_heads=1))
    with torch.inference_mode():
        with pytest.raises(ValueError, match="cache must be one of this model with n_layer="):
            model(IDS, cache=other.new_cache(2, 8))
        with pytest.raises(ValueError, match="cache must be one of this model with n_kv_heads="):
            model(IDS, cache=fewer.new_cache(2, 8))
        with pytest.raises(ValueError, match="cache must hold at most block_size=24 tokens, got 48"):
            model(IDS, cache=longer.new_cache(2, 48))
        with pytest.raises(TypeError, match="cache must be torch\\.float32, like the model, got"):
            model(IDS, cache=KVCache(model.config, 2, 8, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="count must be 0 or more, got -3"):
            cache.reserve(-3)
    with torch.inference_mode():
        model(IDS, cache=cache)
        with pytest.raises(ValueError, match="input_ids has 5 tokens, but of the 8 places of the cache 5 are taken"):
            model(IDS, cache=cache)


def test_a_forward_that_fails_leaves_the_cache_as_it_was() -> None:
    model, ids = scrambled(), torch.arange(10).view(2, 5)
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        model(ids[:, :2], cache=cache)
        with pytest.raises(IndexError, match="targets: expected classes from 0 to"):
            model(ids[:, 2:], ids[:, 2:] + 10**6, cache=cache)
        assert cache.used == 2
        torch.testing.assert_close(model(ids[:, 2:], cache=cache), model(ids)[:, 2:])
        assert cache.used == 5


def test_a_cache_of_inference_mode_works_without_it() -> None:
    model = scrambled()
    with torch.inference_mode():
        cache = model.new_cache(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, cache=cache), model(IDS))


def test_cuda_graph_needs_cuda() -> None:
    model, ids = scrambled(), prompt()
    with pytest.raises(ValueError, match="cuda_graph must be False or None"):
        muddformer.generate(model, ids, max_new_tokens=2, cuda_graph=True)
    with pytest.raises(TypeError, match="cuda_graph must be True, False or None, got int"):
        muddformer.generate(model, ids, max_new_tokens=2, cuda_graph=1)
    expected = muddformer.generate(model, ids, max_new_tokens=12)
    assert torch.equal(muddformer.generate(model, ids, max_new_tokens=12, cuda_graph=False), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_graph_gives_the_same_tokens(variant: str, dtype: torch.dtype) -> None:
    model, ids = scrambled(variant).to("cuda", dtype), prompt().cuda()
    for options in ({}, {"temperature": 0.8, "top_k": 9, "seed": 3}, {"eos_token_id": 5}):
        eager = muddformer.generate(model, ids, max_new_tokens=19, cuda_graph=False, **options)
        for graph in (True, None):
            assert torch.equal(muddformer.generate(model, ids, max_new_tokens=19, cuda_graph=graph, **options), eager)


@pytest.mark.cuda
def test_cuda_graph_is_left_where_code_of_others_runs() -> None:
    model, lengths = scrambled().cuda(), []
    model.layers[1].register_forward_pre_hook(lambda _, streams: lengths.append(streams[0].shape[1]))
    muddformer.generate(model, prompt().cuda(), max_new_tokens=12)
    assert lengths == [5] + [1] * 11
    with torch.autocast("cuda", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        muddformer.generate(model, prompt().cuda(), max_new_tokens=12, cuda_graph=True)


@pytest.mark.slow
def test_memory_over_many_prompt_lengths(device: torch.device) -> None:
    """300 lengths: no cache and no captured graph of earlier prompts is kept, and earlier results stay as they are."""

    def memory() -> int:
        if device.type == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model = make("default", block_size=512).to(device)
    first = muddformer.generate(model, prompt(length=40).to(device), max_new_tokens=9)
    kept = first.clone()
    for length in range(2, 302):
        muddformer.generate(model, prompt(length=length).to(device), max_new_tokens=9 if length % 10 == 0 else 1)
        if length == 101:
            before = memory()
    assert memory() - before < 32 << 20
    assert torch.equal(first, kept)
