"""``generate`` of attached models."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.attached import FAMILIES, attached, tokens


@pytest.mark.parametrize(
    ("family", "cache"), [*((family, "dynamic") for family in FAMILIES), ("Qwen3", "static"), ("GPTNeoX", "static")]
)
@torch.no_grad()
def test_generation_is_that_of_whole_forwards(family: str, cache: str) -> None:
    model, ids = attached(family), tokens(length=5)
    made = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    whole = ids
    for _ in range(6):
        whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, whole)


@torch.no_grad()
def test_generation_of_padded_prompts_and_beams() -> None:
    model, ids = attached("Qwen3"), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    alone, batch = (
        model.generate(x, attention_mask=(x != 0).long(), max_new_tokens=4, num_beams=2, do_sample=False)[:, -4:]
        for x in (ids, padded)
    )
    assert torch.equal(alone, batch)


@pytest.mark.cuda
@pytest.mark.parametrize("cache", ["dynamic", "static"])  # the static one compiles the decoding step
@torch.no_grad()
def test_cuda_generation(cache: str) -> None:
    model, ids = attached("Qwen3"), tokens(length=5)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    made = copy.deepcopy(model).cuda().generate(ids.cuda(), **options)
    assert torch.equal(made.cpu(), model.generate(ids, **options))
