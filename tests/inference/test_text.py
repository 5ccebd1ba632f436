"""Text and tokens as a stream."""

from __future__ import annotations

import pytest
import torch

import muddformer
from helpers.models import make, scramble
from muddformer.inference.text import stream_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def test_streamed_tokens_are_those_of_generate():
    model = scramble(make())
    prompt = [1, 2, 3]
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}):
        expected = muddformer.generate(model, torch.tensor([prompt]), max_new_tokens=5, seed=4, **options)
        assert prompt + list(stream_tokens(model, prompt, 5, seed=4, **options)) == expected[0].tolist()


def test_text_goes_on_beyond_the_context():
    model = make(block_size=8)
    assert len(list(stream_tokens(model, [1] * 20, 30))) == 30
