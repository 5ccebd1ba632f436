"""The loop: what a run leaves in its folder, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("yaml")

from helpers.runs import MODEL, trained
from muddformer.errors import Diverged, InputError
from muddformer.inference.loading import find_checkpoints
from muddformer.inference.text import stream_text, stream_tokens
from muddformer.models import FAMILIES, Family, MUDDFormerConfig, Pretrained, from_pretrained
from muddformer.training import loop, modelling
from muddformer.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loss_falls_and_metrics_are_complete(make_settings, tmp_path):
    result = loop.Trainer(make_settings(steps=60, learning_rate=1e-2), tmp_path / "run").fit()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert result.finished and result.step == 60 and result.val_loss == rows[-1].val_loss
    assert [row.step for row in rows] == list(range(1, 61))
    assert [row.tokens for row in rows] == [16 * n for n in range(1, 61)]
    assert [row.step for row in rows if row.val_loss is not None] == [10, 20, 30, 40, 50, 60]
    assert rows[-1].val_loss < 0.8 * rows[0].loss
    assert all(row.tokens_per_s > 0 and row.memory_mib > 0 and row.grad_norm > 0 for row in rows)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-00000055", "step-00000060"]


def test_log_interval_changes_no_number(make_settings, tmp_path):
    for every in (1, 7):
        loop.Trainer(make_settings(steps=20, log_every=every), tmp_path / f"run{every}").fit()
    first, second = (read_metrics(tmp_path / f"run{every}" / "metrics.csv") for every in (1, 7))
    assert list(map(trained, first)) == list(map(trained, second))


def test_order_of_the_data_is_the_same_for_both_models(make_settings, tmp_path):
    batches = []
    for dense in (True, False):
        trainer = loop.Trainer(make_settings().override([f"model.dense={dense}"]), tmp_path / str(dense))
        batches.append(trainer.batches(5, 20)[0])
    assert torch.equal(*batches)


def test_accumulation_equals_one_large_batch(make_settings, tmp_path):
    models = []
    for name, sizes in {"one": {"batch_size": 4}, "two": {"batch_size": 2, "accumulation": 2}}.items():
        trainer = loop.Trainer(make_settings(steps=3, **sizes), tmp_path / name)
        trainer.fit()
        models.append(trainer.model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_bfloat16(make_settings, tmp_path):
    trainer = loop.Trainer(make_settings(steps=30, dtype="bfloat16", learning_rate=1e-2), tmp_path / "run")
    trainer.fit()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert rows[-1].loss < rows[0].loss - 0.3


def test_tensorboard(make_settings, tmp_path):
    pytest.importorskip("tensorboard")
    settings = make_settings(steps=4, tensorboard=True, log_connections=True)
    loop.Trainer(settings, tmp_path / "run").fit()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row.loss for row in rows])
    for name in ("val_loss", "history_rms/X_2", "first_token/block_1", "older_sources/1_q"):
        assert [event.step for event in events.Scalars(name)] == [4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(make_settings, tmp_path, monkeypatch, bad):
    run = tmp_path / "run"
    schedule = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, train: bad if step == 12 else schedule(step, train))
    with pytest.raises(Diverged, match=r"step 13: loss nan and gradient norm nan.*step-00000010"):
        loop.Trainer(make_settings(steps=40, log_every=4), run).fit()
    assert [path.name for path in find_checkpoints(run)] == ["step-00000005", "step-00000010"]
    assert all(torch.isfinite(value).all() for value in from_pretrained(find_checkpoints(run)[-1]).parameters())
    assert math.isnan(read_metrics(run / "metrics.csv")[-1].loss)
    monkeypatch.undo()
    assert loop.Trainer(make_settings(steps=20), run, resume=True).fit().finished  # from step 10
    assert [row.step for row in read_metrics(run / "metrics.csv")] == list(range(1, 21))


def test_hidden_states_that_overflow_end_a_run(make_settings, tmp_path):
    trainer = loop.Trainer(make_settings(steps=4), tmp_path / "run")
    with torch.no_grad():
        trainer.model.tok_embeddings.weight.mul_(1e25)  # the squares are infinite, so norms return 0
    with pytest.raises(Diverged, match=r"step 1: loss \d\.\d+ and gradient norm 0.*there was no checkpoint yet"):
        trainer.fit()


def test_run_folder_is_not_overwritten_by_accident(make_settings, tmp_path):
    loop.Trainer(make_settings(steps=2), tmp_path / "run").fit()
    with pytest.raises(InputError, match="--resume"):
        loop.Trainer(make_settings(steps=2), tmp_path / "run")
    loop.Trainer(make_settings(steps=3), tmp_path / "run", overwrite=True).fit()
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")) == 3


def test_overwrite_removes_what_the_run_wrote_alone(make_settings, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    loop.Trainer(make_settings(steps=2), run).fit()
    for name in ("step-00000002-best", "notes"):
        (disk / name).mkdir()
        (disk / name / "mine").touch()
    loop.Trainer(make_settings(steps=3), run, overwrite=True).fit()
    assert sorted(path.name for path in disk.iterdir()) == ["notes", "step-00000002-best", "step-00000003"]
    assert (disk / "notes" / "mine").exists() and (run / "checkpoints").is_symlink()


def test_resume_wants_the_same_model_and_text(make_settings, tmp_path, folder):
    run = tmp_path / "run"
    loop.Trainer(make_settings(steps=5), run).fit()
    with pytest.raises(InputError, match="section 'model'"):
        loop.Trainer(make_settings(steps=9).override(["model.dim=32"]), run, resume=True)
    with pytest.raises(InputError, match="training text"):
        loop.Trainer(make_settings(steps=9).override(["data.vocab_size=270"]), run, resume=True)
    assert loop.Trainer(make_settings(steps=9), run, resume=True).fit().step == 9
    assert loop.Trainer(make_settings(steps=9), run, resume=True).fit().finished  # nothing left to do
    assert len(read_metrics(run / "metrics.csv")) == 9


def test_run_folder_inside_the_data_can_be_resumed(make_settings, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("the query, the key and the value\n" * 60)
    settings = make_settings(steps=6).merge({"data": {"paths": [str(texts)], "pattern": "*"}})
    loop.Trainer(settings, texts / "run").fit()
    longer = settings.merge({"train": {"steps": 8}})
    assert loop.Trainer(longer, texts / "run", resume=True).fit().step == 8


def test_overwrite_keeps_the_run_until_the_text_is_read(make_settings, tmp_path):
    settings, run = make_settings(steps=5), tmp_path / "run"
    loop.Trainer(settings, run).fit()
    with pytest.raises(InputError):
        loop.Trainer(settings.merge({"data": {"paths": [str(tmp_path / "none")]}}), run, overwrite=True)
    assert find_checkpoints(run)


def test_model_and_plain_twin_start_with_equal_blocks():
    dense, plain = (modelling.make_model({**MODEL, "dense": dense}, 64, seed=3) for dense in (True, False))
    ours = dense.state_dict()
    for name, value in plain.state_dict().items():
        if "norm" not in name:
            assert torch.equal(value, ours[name]), name


def test_streamed_text_is_whole(make_settings, tmp_path):
    trainer = loop.Trainer(make_settings(steps=1), tmp_path / "run")
    trainer.fit()
    pieces = list(stream_text(tmp_path / "run", "密 way", max_new_tokens=40, temperature=3.0, device="cpu"))
    ids = trainer.corpus.tokenizer.encode("密 way").ids
    tokens = list(stream_tokens(trainer.model.eval(), ids, 40, 3.0))
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    assert "".join(pieces) == trainer.corpus.tokenizer.decode(tokens) and len(pieces) == len(tokens) + 1


def test_connections_of_another_family_cannot_be_logged(make_settings, tmp_path, monkeypatch):
    class Recurrent(Pretrained):
        pass

    monkeypatch.setitem(FAMILIES, "recurrent", Family(MUDDFormerConfig, Recurrent))
    monkeypatch.setattr(loop, "make_config", lambda *args, **kwargs: None)
    settings = make_settings(log_connections=True).merge({"model": {"model_type": "recurrent"}})
    with pytest.raises(InputError, match=r"train.log_connections must be false: model.model_type .* Recurrent"):
        loop.Trainer(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
