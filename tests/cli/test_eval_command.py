"""``muddformer eval``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("lm_eval")

from helpers.models import make, scramble
from muddformer.cli import main
from muddformer.inference.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint ``model``, two texts, and the task ``choice.yaml``."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = train_tokenizer(["the query and the key"] * 9, 300)
    torch.manual_seed(0)
    scramble(make(vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("the query and the key of größe 密\n" * 9)
    (folder / "texts" / "b.txt").write_text("the value\n" * 30)
    rows = [{"question": "the", "choices": [" key", " query"], "answer": i % 2} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


def evaluate(folder: Path, *options: object) -> int:
    return main(["eval", "--checkpoint", str(folder / "model"), "--device", "cpu", *map(str, options)])


def test_perplexity(capsys, folder, tmp_path):
    reports, tables = [], []
    for batch_size in (1, 16):
        output = tmp_path / f"{batch_size}.json"
        options = ("--window", 16, "--stride", 4, "--batch-size", batch_size, "--output", output)
        assert evaluate(folder, "--text", folder / "texts", *options) == 0
        printed, progress = capsys.readouterr()
        tables.append(printed)
        assert progress.splitlines()[-1] == "scoring 100 %"
        reports.append(json.loads(output.read_text()))
    assert tables[0] == tables[1]
    head, _, *lines = [line.strip("| ").split(" | ") for line in tables[0].splitlines()]
    assert head == ["text", "tokens", "bytes", "nats per token", "perplexity", "bits per byte"]
    assert [line[0] for line in lines] == ["texts/a.txt", "texts/b.txt", "total"]
    report = reports[0]
    assert report["versions"]["torch"] == torch.__version__ and report["dtype"] == "float32"
    texts = report["perplexity"]
    assert (texts["window"], texts["stride"]) == (16, 4)
    size = sum(path.stat().st_size for path in (folder / "texts").iterdir())
    assert texts["total"]["bytes"] == size and lines[-1][2] == f"{size:,}"
    assert texts["total"]["nats"] == pytest.approx(sum(file["nats"] for file in texts["files"]))
    assert lines[-1][3] == f"{texts['total']['nats_per_token']:.4f}"


def test_what_was_read_is_said(capsys, folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "rows.jsonl").write_text(json.dumps({"content": "the key and the query"}) + "\n")
    (texts / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    (texts / "empty.txt").touch()
    assert evaluate(folder, "--text", texts, "--text-field", "content") == 0
    output, errors = capsys.readouterr()
    assert "texts/rows.jsonl" in output
    assert "text: 2 files; left out: 1 empty (empty.txt)" in errors.splitlines()
    assert "1 files are not UTF-8 and have no byte order mark: 2 places" in errors
    assert evaluate(folder, "--text", texts, "--pattern", "*.jsonl") == 2
    assert "no text in the field 'text' (data.text_field, --text-field); it has 'content'" in capsys.readouterr().err


def test_many_texts_have_one_line(capsys, folder, tmp_path):
    for number in range(21):
        (tmp_path / f"{number}.txt").write_text("the key\n")
    assert evaluate(folder, "--text", tmp_path, "--dtype", "float64") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_tasks(capsys, folder, tmp_path):
    output = tmp_path / "report.json"
    assert evaluate(folder, "--tasks", folder / "choice.yaml", "--shots", 1, "--output", output) == 0
    head, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert head == ["task", "version", "shots", "samples", "metric", "filter", "value", "standard error"]
    assert lines[0][:6] == ["tiny_choice", "1.0", "1", "8", "acc", "none"] and float(lines[0][7]) > 0
    first = json.loads(output.read_text())["tasks"][0]
    assert first["task"] == "tiny_choice" and f"{first['value']:.4f}" == lines[0][6]
    assert f"{first['stderr']:.4f}" == lines[0][7]
    assert evaluate(folder, "--tasks", "tiny_choice", "--task-folder", folder, "--limit", 4) == 0
    assert "| 4 | acc |" in capsys.readouterr().out


def test_bad_input(capsys, folder, tmp_path):
    texts = ("--text", folder / "texts")
    for options, words in (
        ((), "give --text, --tasks or both"),
        ((*texts, "--window", 99), "window must be from 1 to 24"),
        ((*texts, "--stride", 99), "stride must be from 1 to 24"),
        ((*texts, "--batch-size", 0), "--batch-size"),
        ((*texts, "--output", tmp_path / "no" / "a.json"), "is in a folder that is not there"),
        (("--text", tmp_path / "none"), "none"),
        (("--tasks", tmp_path / "none.yaml"), "cannot read the task"),
    ):
        capsys.readouterr()
        assert evaluate(folder, *options) == 2
        output, errors = capsys.readouterr()
        *before, error = errors.splitlines()
        assert output == "" and words in error and all(line.startswith("text: ") for line in before)
    scramble(make(vocab_size=100)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "model" / "tokenizer.json").read_bytes())
    assert main(["eval", "--checkpoint", str(tmp_path), *map(str, texts)]) == 2
    assert "they do not belong together" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").unlink()
    assert main(["eval", "--checkpoint", str(tmp_path), *map(str, texts)]) == 2
    assert "cannot read tokenizer" in capsys.readouterr().err


def test_without_the_harness(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert evaluate(folder, "--tasks", "lambada_openai") == 2
    assert 'pip install "muddformer[eval]"' in capsys.readouterr().err
    assert evaluate(folder, "--text", folder / "texts" / "b.txt") == 0
