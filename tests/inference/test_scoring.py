"""Likelihoods of tokens and perplexities of texts."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from helpers.models import make, scramble
from muddformer.errors import InputError
from muddformer.inference.scoring import Passage, TextScore, cut_windows, score, score_texts
from muddformer.inference.tokenizer import end_token, first_token, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = {
    "long": ["the query and the key of größe 密 🙂\n" * 9, "and the value\n" * 5],
    "short": ["the"],
    "empty": [],
    "longer": ["the value and the query, the key\n" * 20],
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((piece for text in TEXTS.values() for piece in text), 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return scramble(make(vocab_size=tokenizer.get_vocab_size())).double().eval()


def test_scores_are_those_of_the_logits(model):
    ids = torch.randint(model.config.vocab_size, (6, 20))
    passages = [Passage(row[:length].tolist(), scored) for row, length, scored in
                zip(ids, (20, 3, 20, 9, 2, 15), (5, 2, 19, 1, 1, 14), strict=True)]  # fmt: skip
    likely = model(ids[:1, :4])[0, -1].argmax().item()
    passages.append(Passage([*ids[0, :4].tolist(), likely], 1))
    for batch_size in (1, 4, 100):
        results = list(score(model, passages, batch_size))
        assert len(results) == len(passages)
        for passage, (logs, likeliest) in zip(passages, results, strict=True):
            row = torch.tensor(passage.ids)
            expected = model(row[None, :-1])[0].log_softmax(-1)
            place = torch.arange(len(row) - 1)[-passage.scored :]
            torch.testing.assert_close(logs, expected[place, row[1:][place]].detach(), rtol=1e-5, atol=1e-5)
            assert torch.equal(likeliest, expected.argmax(-1)[place] == row[1:][place])
        assert results[-1][1].all()
    with pytest.raises(IndexError, match="vocab_size"):
        list(score(model, [Passage([10**6, 0], 1)]))


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1), (24, 7)])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 17, 60])
def test_windows_score_each_token_once(window, stride, length):
    ids = list(range(length))
    scored = []
    for number, (tokens, count) in enumerate(cut_windows(ids, window, stride)):
        assert 0 < count < len(tokens) <= window + 1 and tokens == ids[tokens[0] : tokens[-1] + 1]
        assert number == 0 or (len(tokens) == window + 1 and count <= stride)
        assert number > 0 or tokens[0] == 0
        scored += tokens[-count:]
    assert scored == ids[1:]


def test_perplexity_of_texts(model, tokenizer):
    texts = list(TEXTS.items())
    scores = {
        batch: score_texts(model, tokenizer, texts, window=16, stride=5, batch_size=batch) for batch in (1, 3, 64)
    }
    for number, (name, pieces) in enumerate(texts):
        ids = [0, *(token for piece in pieces for token in tokenizer.encode(piece).ids)]
        nats = 0.0
        for place in range(1, len(ids)):  # one token after the other, as far back as its window goes
            end = next(end for end in [16, *range(21, 9999, 5)] if end >= place)
            first = max(0, min(end, len(ids) - 1) - 16)
            with torch.no_grad():
                logs = model(torch.tensor(ids[first:place])[None])[0, -1].double().log_softmax(-1)
            nats -= logs[ids[place]].item()
        for batch in scores:
            found = scores[batch][number]
            assert (found.name, found.tokens, found.bytes) == (name, len(ids) - 1, len("".join(pieces).encode()))
            assert found.nats == pytest.approx(nats, rel=1e-9)
    first = [entry.to_dict() for entry in scores[1]]
    for batch in (3, 64):
        for one, other in zip(first, [entry.to_dict() for entry in scores[batch]], strict=True):
            for key, value in one.items():
                assert other[key] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-9))


def test_float32_is_the_same_number_too(model, tokenizer):
    model = copy.deepcopy(model).float()
    found = [score_texts(model, tokenizer, TEXTS.items(), batch_size=batch) for batch in (1, 5, 64)]
    for entries in zip(*found, strict=True):
        printed = {f"{entry.nats_per_token:.4f} {entry.bits_per_byte:.4f}" for entry in entries}
        assert len(printed) == 1


def test_figures_of_a_score():
    score = TextScore("a", tokens=4, bytes=16, nats=8 * math.log(2))
    assert score.nats_per_token == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4) and score.bits_per_byte == pytest.approx(0.5)
    nothing = TextScore("b", 0, 0, 0.0)
    assert all(map(math.isnan, (nothing.nats_per_token, nothing.perplexity, nothing.bits_per_byte)))
    assert nothing.to_dict()["perplexity"] is None
    assert TextScore("c", 1, 1, 1e4).perplexity == math.inf


def test_defaults_and_progress(model, tokenizer):
    seen = []
    text = [("long", TEXTS["long"])]
    scores = score_texts(model, tokenizer, text, progress=lambda *counts: seen.append(counts))
    assert scores == score_texts(model, tokenizer, text, window=24, stride=12)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1][0] == seen[-1][1]


def test_tokens_that_texts_begin_and_end_with(tokenizer):
    assert first_token(tokenizer) == end_token(tokenizer) == 0
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    assert first_token(plain) is None and end_token(plain) is None
    llama = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1, "<s>": 2}, []))
    llama.add_special_tokens(["<s>", "</s>"])
    assert (first_token(llama), end_token(llama)) == (2, 1)
    own = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    llama.post_processor = own
    assert first_token(llama) == 1


def test_a_tokenizer_without_a_first_token(model):
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    (found,) = score_texts(model, plain, [("x", ["abba"])])
    assert (found.tokens, found.bytes) == (3, 4)


def test_bad_input(model, tokenizer):
    for options, match in (
        ({"window": 25}, "window must be from 1 to 24"),
        ({"window": 8, "stride": 9}, "stride must be from 1 to 8"),
        ({"batch_size": 0}, "batch_size must be from 1"),
    ):
        with pytest.raises(ValueError, match=match):
            score_texts(model, tokenizer, [], **options)
    with pytest.raises(InputError, match="not causal"):
        score_texts(make("bidirectional"), tokenizer, [])
