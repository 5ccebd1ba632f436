"""``generate`` of transformers: every cache and way of decoding gives what our own generation gives."""

from __future__ import annotations

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import muddformer
from helpers.hf import small, tiny_tokenizer
from helpers.models import make, scramble, some_ids

NEW = 6


@pytest.fixture(scope="module")
def model():
    return small("gqa")


@pytest.fixture(scope="module")
def prompt():
    torch.manual_seed(1)
    return some_ids(2, 5)


@pytest.fixture(scope="module")
def expected(prompt):
    torch.manual_seed(0)
    return muddformer.generate(scramble(make("gqa")).eval(), prompt, max_new_tokens=NEW, temperature=0)


def greedy(model, prompt, **kwargs):
    return model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **kwargs)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_caches(model, prompt, expected, cache) -> None:
    kwargs = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(greedy(model, prompt, **kwargs), expected)


def test_left_padded_prompts(model, prompt, expected) -> None:
    short = greedy(model, prompt[:1, 2:])
    padded = prompt.clone()
    padded[0, :2] = 0
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    found = greedy(model, padded, attention_mask=mask)
    assert torch.equal(found[0, 2:], short[0]) and torch.equal(found[1], expected[1])


def test_beams(model, prompt) -> None:
    """The best beam is at least as likely as what greedy decoding finds."""
    found = greedy(model, prompt, num_beams=4, return_dict_in_generate=True, output_scores=True)
    alone = greedy(model, prompt[:1], num_beams=4)
    assert torch.equal(found.sequences[0], alone[0])
    best = greedy(model, prompt, num_beams=4, num_return_sequences=4)

    def likelihood(rows):
        with torch.no_grad():
            logs = model(rows).logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
        return logs[:, -NEW:].sum(-1)

    scores = likelihood(best).view(2, 4)
    assert (scores[:, :-1] >= scores[:, 1:] - 1e-4).all()
    assert (scores[:, 0] >= likelihood(greedy(model, prompt)) - 1e-4).all()


def test_assisted_decoding(model, prompt, expected) -> None:
    assistant = small("plain")
    assert torch.equal(greedy(model, prompt[:1], assistant_model=assistant), expected[:1])
    assert torch.equal(greedy(model, prompt[:1], prompt_lookup_num_tokens=2), expected[:1])


def test_streaming(model, prompt, expected) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens = []

        def put(self, value) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    collector = Collector()
    greedy(model, prompt[:1], streamer=collector)
    assert collector.tokens == expected[0].tolist()
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True)
    greedy(model, prompt[:1], streamer=streamer)
    assert "".join(streamer)


def test_a_cache_that_goes_on(model, prompt, expected) -> None:
    """Turn after turn with one cache, as a conversation has it."""
    with torch.no_grad():
        first = model(expected[:, :5], use_cache=True)
        cache = first["cache"] if "cache" in first else first["past_key_values"]
        rest = model(expected[:, 5:9], past_key_values=cache).logits
        whole = model(expected[:, :9]).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-5)
