"""Our models in lm-evaluation-harness, beside the same weights in the harness's own class for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import lm_eval.tasks
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from helpers.models import make, scramble
from muddformer import from_pretrained
from muddformer.errors import InputError
from muddformer.inference.harness import harness_model
from muddformer.inference.tasks import run_tasks
from muddformer.inference.tokenizer import SEPARATOR, train_tokenizer
from muddformer.models.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the query and the key, the value of the query: yes or no\n"
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 3.0}}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The harness's class for a GPT-NeoX model, and ours for the same weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT * 9], 290)
    config = transformers.GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=48,
    )  # fmt: skip
    model = scramble(transformers.GPTNeoXForCausalLM(config), 0.3).eval()
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR)
    other = HFLM(pretrained=model, tokenizer=theirs, batch_size=3, device="cpu", max_length=48)
    return other, harness_model(from_pretrained(folder / "ours"), tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ("the query", "the key", "the value", "yes", "no")
    rows = [{"question": words[i % 5], "choices": list(words), "answer": (i * 3) % 5} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in (1, 2, 5)))
    answers = [{"question": word, "answer": " th"} for word in words]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "choice.yaml").write_text(CHOICE.format(name="tiny_choice", data=folder / "rows.jsonl"))
    (folder / "rolling.yaml").write_text(ROLLING.format(data=folder / "texts.jsonl"))
    (folder / "generation.yaml").write_text(GENERATION.format(data=folder / "answers.jsonl"))
    return folder


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_likelihoods(both):
    other, ours = both
    pairs = [
        ("the", " query"),
        ("", "the key"),
        ("the query and", " the value of"),
        ("yes ", "or no"),
        (TEXT * 9, " no"),
    ]
    pairs += [("the query", f" {word}") for word in ("key", "and", "yes")]
    arguments = requests("loglikelihood", pairs)
    for (expected, greedy), (found, likeliest) in zip(
        other.loglikelihood(arguments), ours.loglikelihood(arguments), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4) and likeliest == greedy
    texts = requests("loglikelihood_rolling", [(TEXT * n,) for n in (1, 7, 3)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(other.loglikelihood_rolling(texts), rel=1e-4)


def test_continuations(both):
    other, ours = both
    greedy = {"do_sample": False, "max_gen_toks": 8}
    arguments = requests("generate_until", [
        ("the query", {**greedy, "until": ["\n"]}), ("the key", {**greedy, "until": ["e", "k"]}),
        ("yes", {**greedy, "until": []}), ("the value", {**greedy, "until": ["\n"]}),
        (TEXT * 9, {**greedy, "until": "q"}),
    ])  # fmt: skip
    assert ours.generate_until(arguments) == other.generate_until(arguments)
    sampled = [("the", {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "until": []})]
    first, second = (ours.generate_until(requests("generate_until", sampled)) for _ in range(2))
    assert first == second and first[0]
    with pytest.raises(InputError, match="cannot be followed here: num_beams"):
        ours.generate_until(requests("generate_until", [("the", {"num_beams": 3})]))


@pytest.mark.parametrize("shots", [None, 2])
def test_tasks_from_local_files(both, tasks, shots):
    names = [str(tasks / name) for name in ("choice.yaml", "rolling.yaml", "generation.yaml")]
    if shots:
        names = names[:1]
    expected, found = (run_tasks(model, names, shots=shots, seed=1) for model in both)
    assert {figure.task for figure in found} >= {"tiny_choice"}
    assert len(found) == len(expected)
    for theirs, figure in zip(expected, found, strict=True):
        assert figure[:-2] == theirs[:-2]
        for value, other in zip(figure[-2:], theirs[-2:], strict=True):
            assert value == (None if other is None else pytest.approx(other, rel=1e-4))
    (accuracy,) = (figure for figure in found if figure.metric == "acc")
    assert accuracy.shots == (shots or 0) and accuracy.samples == 12 and accuracy.version == "3.0"
    assert 0 < accuracy.stderr < 0.2
    assert accuracy.stderr == pytest.approx((accuracy.value * (1 - accuracy.value) / 11) ** 0.5)


def test_batch_sizes_and_limits(both, tasks):
    _, ours = both
    figures = []
    for batch_size in (1, 5):
        model = harness_model(ours.model, ours.tokenizer, batch_size=batch_size)
        figures.append(run_tasks(model, ["tiny_choice"], folders=[tasks], limit=7))
    assert figures[0] == figures[1] and figures[0][0].samples == 7


def test_bad_tasks(both, tasks, tmp_path, monkeypatch):
    _, ours = both
    known = lm_eval.tasks.TaskManager  # to look through the harness's own thousands takes long
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults: known(include_path=include_path, include_defaults=False),
    )
    with pytest.raises(InputError, match="has no task 'tiny_choise'; did you mean 'tiny_choice'"):
        run_tasks(ours, ["tiny_choise"], folders=[tasks])
    with pytest.raises(InputError, match="cannot read the task"):
        run_tasks(ours, [str(tmp_path / "none.yaml")])
    (tmp_path / "empty.yaml").write_text("output_type: x\n")
    with pytest.raises(InputError, match="defines no task"):
        run_tasks(ours, [str(tmp_path / "empty.yaml")])
    (tmp_path / "gone.yaml").write_text(CHOICE.format(name="gone", data=tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="the tasks gone cannot be run: "):
        run_tasks(ours, [str(tmp_path / "gone.yaml")])


def test_a_text_that_needs_a_first_token():
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    ours = harness_model(make("plain"), plain)
    assert ours.loglikelihood(requests("loglikelihood", [("ab", "ba")]))[0][0] < 0
    with pytest.raises(InputError, match="no token that a text begins after"):
        ours.loglikelihood(requests("loglikelihood", [("", "ba")]))
    with pytest.raises(InputError, match="a continuation of 30 tokens is longer than the model's block_size 24"):
        ours.loglikelihood(requests("loglikelihood", [("a", "b" * 30)]))
