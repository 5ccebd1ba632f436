"""The quality benchmarks: a corpus from packages, runs that are cut off, and the page made from their rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing.connection
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from helpers.programs import BENCHMARKS, programs

QUALITY = BENCHMARKS / "quality"
pytest.importorskip("yaml")
pytest.importorskip("tokenizers")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")

SET = {
    "title": "tiny",
    "kind": "time",
    "model": {"n_layer": 2, "dim": 32, "n_head": 2, "intermediate_size": 256, "block_size": 32},
    "train": {"batch_size": 2, "learning_rate": 1e-3, "eval_batches": 2},
    "evaluations": 3,
    "tokens": [12 * 64],
    "seeds": [0],
    "forms": {
        "plain": {"label": "plain", "model": {"dense": False, "residual_dtype": "autocast"}},
        "mudd": {"label": "MUDD"},
    },
}


@pytest.fixture
def quality() -> Iterator[SimpleNamespace]:
    """The programs as modules."""
    with programs(QUALITY, *(path.stem for path in sorted(QUALITY.glob("*.py")))) as modules:
        yield modules


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages/*.deb and the packages.yaml that lists them, one with an archive in it."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "packages").mkdir()
    listed = []
    for name, archive in (("alpha", None), ("beta", "usr/src/beta.tar.xz")):
        tree = folder / name
        source = tree / "usr" / "src" / name
        source.mkdir(parents=True)
        for n in range(60):
            (source / f"{name}{n}.c").write_text("".join(f"int {name}_{n}_{i}(void);\n" for i in range(20)))
        (source / "copy.c").write_text((source / f"{name}1.c").read_text())
        (source / "large.c").write_text("x" * 5000)
        (source / "binary.c").write_bytes(b"\0\1\2")
        (source / "other.xyz").write_text("not asked for")
        if archive:
            subprocess.run(["tar", "-cJf", tree / archive, "-C", source.parent, name], check=True)
            shutil.rmtree(source)
        (tree / "DEBIAN").mkdir()
        control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n"
        (tree / "DEBIAN" / "control").write_text(f"{control}Description: text\n")
        built = folder / "packages" / f"{name}_1.0_all.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, built], check=True, capture_output=True)
        sha256 = hashlib.sha256(built.read_bytes()).hexdigest()
        listed.append({"package": name, "version": "1.0", "sha256": sha256, "licence": "none", "suffixes": ["c"]})
        if archive:
            listed[-1]["archive"] = archive
    settings = {
        "vocab_size": 300,
        "held_out": 0.1,
        "largest_file": 4096,
        "tokenizer_sample": 2,
        "part_tokens": 4096,
        "parts": 9,
    }
    (folder / "packages.yaml").write_text(yaml.safe_dump({**settings, "packages": listed}))
    return folder


@pytest.fixture
def made(quality: SimpleNamespace, packages: Path) -> Path:
    """The folder of the corpus made from them, once."""
    if not (packages / "parts").exists():
        assert quality.corpus.main([str(packages), "--packages", str(packages / "packages.yaml")]) == 0
    return packages / "parts"


@pytest.fixture
def tiny_set(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SET, sort_keys=False))
    return path


@needs_dpkg
def test_corpus_from_packages(quality, packages, made):
    parts = quality.parts.Parts(made)
    manifest = parts.manifest
    assert manifest["packages"] == {"alpha": "1.0", "beta": "1.0"}
    assert manifest["reading"] == quality.corpus.READING and manifest["tokenizers"]
    assert sum(manifest["documents"].values()) == 120  # without copies, large, binary and other files
    assert 0 < manifest["documents"]["held_out"] < 40
    assert len(manifest["train"]) > 1 and all(p["tokens"] == 4096 for p in manifest["train"][:-1])
    assert not list(packages.glob("text-*"))

    from muddformer.inference.tokenizer import parse_tokenizer

    text = parse_tokenizer(parts.tokenizer_json).decode(parts.train(5000).tolist())
    assert "int alpha_" in text and "int beta_" in text, "the files follow in a random order"
    again = {path.name: path.read_bytes() for path in made.iterdir()}
    quality.corpus.main([str(packages), "--packages", str(packages / "packages.yaml")])
    assert {path.name: path.read_bytes() for path in made.iterdir()} == again


def test_the_corpus_stays_what_it_is(quality, tmp_path):
    """The id of a corpus of the kinds of files that other readings take otherwise, as published rows name it."""
    from muddformer.training.corpus import find_documents

    root = tmp_path / "text" / "package"
    for name in ("one", "two", "three", ".hidden", "__pycache__"):
        (root / name).mkdir(parents=True)
        for n in range(20):
            text = "".join(f"  int {name.strip('._')}_{n}_{i};\n" for i in range(9))
            (root / name / f"{n}.c").write_text(text + "  }" * (n % 2))  # some have no end of the last line
    (root / "one" / "utf-8 with a mark.c").write_bytes(b"\xef\xbb\xbf" + "größer\r\n".encode())
    (root / "one" / "latin-1.c").write_bytes("größer\n".encode("latin-1"))
    (root / "one" / "utf-16.c").write_bytes("größer\n".encode("utf-16"))
    (root / "one" / "empty.c").write_bytes(b"")
    (root / "two" / "a link.c").symlink_to("../one/1.c")
    (root / "two" / "z link.c").symlink_to("../one/2.c")
    settings = {"vocab_size": 300, "held_out": 0.1, "largest_file": 4096, "tokenizer_sample": 2}
    settings |= {"part_tokens": 4096, "parts": 2, "packages": [{"package": "package", "suffixes": ["c"]}]}
    settings["packages"][0]["links"] = ["two/z link.c"]
    documents = quality.corpus.choose(tmp_path / "text", settings)
    keys = {document.key.removeprefix("text/package/"): document for document in documents}
    assert len(keys) == 62 and {"two/z link.c", "one/latin-1.c"} <= keys.keys()
    assert not {"one/2.c", "two/a link.c", "one/utf-16.c", "one/empty.c"} & keys.keys()
    assert quality.corpus.read(keys["one/utf-8 with a mark.c"]) == "\ufeffgrößer\r\n"
    assert quality.corpus.read(keys["one/latin-1.c"]) == "gr\ufffd\ufffder\n"
    assert len(find_documents([str(tmp_path / "text")])) != len(keys), "training reads other files, and may change"
    manifest = quality.corpus.write_parts(documents, settings, tmp_path / "parts")
    assert quality.parts.write_manifest(tmp_path / "parts", manifest)["id"] == "94f33a028b4c"


@needs_dpkg
def test_bad_corpus(quality, packages, made, tmp_path, tiny_set, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    last = sorted(copy.glob("train-*.xz"))[-1]
    last.unlink()
    parts = quality.parts.Parts(copy)
    assert len(parts.train(4096)) == 4096, "a part that is not needed may be missing"
    with pytest.raises(ValueError, match=last.name):
        parts.train(parts.manifest["train"][0]["tokens"] * len(parts.manifest["train"]) - 4095)
    with pytest.raises(ValueError, match="are asked for"):
        parts.train(10**9)
    shutil.copy(copy / "held-out.xz", copy / "train-000.xz")
    with pytest.raises(ValueError, match="another hash"):
        parts.train(1)
    (copy / "tokenizer.json").write_text("{}")
    assert quality.run.main([str(tiny_set), "--corpus", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert "another hash" in capsys.readouterr().err
    assert quality.run.main([str(tiny_set), "--corpus", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no corpus" in capsys.readouterr().err

    settings = yaml.safe_load((packages / "packages.yaml").read_text())
    (tmp_path / "named.yaml").write_text(yaml.safe_dump({**settings, "id": "0123456789ab"}))
    assert quality.corpus.main([str(packages), "--packages", str(tmp_path / "named.yaml")]) == 0
    assert "is of corpus 0123456789ab: rows of the two cannot be compared" in capsys.readouterr().err
    settings["packages"][0]["sha256"] = "0" * 64
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "new").mkdir()
    shutil.copytree(packages / "packages", tmp_path / "new" / "packages")
    assert quality.corpus.main([str(tmp_path / "new"), "--packages", str(tmp_path / "other.yaml")]) == 2
    assert "cannot download alpha 1.0" in capsys.readouterr().err
    assert (tmp_path / "new" / "packages" / "alpha_1.0_all.deb").exists(), "what is there stays until another has come"


@needs_dpkg
def test_a_damaged_package_is_downloaded_again(quality, packages, tmp_path, monkeypatch):
    """So is any package of the newest version, whatever is there."""
    (package, _), good = yaml.safe_load((packages / "packages.yaml").read_text())["packages"], "alpha_1.0_all.deb"

    def download(command, cwd, **_):
        asked.append(command[-1])
        shutil.copy(packages / "packages" / good, cwd)
        return subprocess.CompletedProcess(command, 0, "", "")

    asked: list[str] = []
    (tmp_path / good).write_bytes(b"damaged")
    monkeypatch.setattr(quality.corpus.subprocess, "run", download)
    for newest in (False, False, True):
        assert quality.corpus.find_package(package, tmp_path, newest) == tmp_path / good
    assert asked == ["alpha=1.0", "alpha"]


@needs_dpkg
@pytest.mark.slow
def test_a_run_that_is_cut_gives_the_rows_of_one_that_is_not(
    quality, made, tmp_path, tiny_set, monkeypatch, capsys, one_thread
):
    def train(out: Path, *more: str) -> int:
        return quality.run.main([str(tiny_set), "--corpus", str(made), "--out", str(out), "--device", "cpu", *more])

    assert train(tmp_path / "whole") == 0
    whole = quality.rows.read_rows(tmp_path / "whole" / "rows.csv")
    assert [(row.form, row.step, row.state) for row in whole] == [
        (form, step, state) for form in ("plain", "mudd") for step, state in ((4, ""), (8, ""), (12, "finished"))
    ]
    assert whole[2].held_out_loss < whole[0].held_out_loss
    assert not [path for path in (tmp_path / "whole").iterdir() if path.is_dir()], "checkpoints of ended runs go"

    assert train(tmp_path / "two", "--processes", "2") == 0
    two = quality.rows.read_rows(tmp_path / "two" / "rows.csv")
    assert sorted(map(_timeless, two), key=str) == sorted(map(_timeless, whole), key=str), "two at once"
    plain = quality.sets.load_set(tiny_set).runs[0]
    parts, rows = quality.parts.Parts(made), tmp_path / "cut" / "rows.csv"
    assert train(tmp_path / "cut", "--seconds", "0") == 3, "no time, nothing done"
    for _ in range(2):  # each makes one step, since its time is over by then
        trainer = quality.trainer.Trainer(parts, 2000, tmp_path / "cut", rows, torch.device("cpu"), deadline=0.0)
        assert trainer(plain) == "cut"
    monkeypatch.setattr(quality.trainer, "device_name", lambda device: "another device")
    trainer = quality.trainer.Trainer(parts, 2000, tmp_path / "moved", rows, torch.device("cpu"), deadline=0.0)
    shutil.copytree(tmp_path / "cut" / plain.id, tmp_path / "moved" / plain.id)
    progress = quality.trainer._Progress(plain, trainer, *trainer._model(plain))
    assert progress.device == f"{whole[0].device} and another device", "seconds of both are of neither"
    monkeypatch.undo()
    update, done = quality.trainer._Progress._update, []

    def killed(progress):
        done.append(progress.step)
        if len(done) == 9:
            raise KeyboardInterrupt
        update(progress)

    monkeypatch.setattr(quality.trainer._Progress, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", "--checkpoint-every", "0")
    with rows.open("a") as file:
        file.write("half a ro")
    assert train(tmp_path / "cut") == 0
    assert train(tmp_path / "cut") == 0, "nothing is left to do"
    cut = quality.rows.read_rows(rows)
    assert [_timeless(row) for row in cut] == [_timeless(row) for row in whole]

    quality.rows.write_rows(rows, [dataclasses.replace(row, corpus="other") for row in cut])
    assert train(tmp_path / "cut") == 2
    assert "rows of corpus other" in capsys.readouterr().err


def _timeless(row):
    return dataclasses.replace(row, seconds=0, date="")


def test_sets(quality, tmp_path):
    described = {path.stem: quality.sets.load_set(path) for path in sorted(QUALITY.glob("runs/*.yaml"))}
    assert described and all(run_set.runs for run_set in described.values())
    mine = {run.id for run in described["time-12x512"].runs}
    assert mine & {run.id for run in described["ablation-12x512"].runs}, "runs that compute the same are one"
    for change, match in (
        ({"kind": "other"}, "kind"),
        ({"colour": 1}, "colour"),
        ({"tokens": [100]}, "multiple"),
        ({"train": {"steps": 5}}, "steps"),
        ({"train": {"batch": 5, "learning_rate": 1e-3}}, "batch_size"),
        ({"kind": "ablation", "order": ["other"]}, "other"),
        ({"kind": "time", "order": ["plain"]}, "ablation"),
        ({"kind": "ablation", "beside": ["other"]}, "other"),
        ({"learning_rates": [1e-3], "train": {"batch_size": 2}}, "of a sweep or of stability, but kind is 'time'"),
        ({"kind": "sweep", "learning_rates": [1e-3]}, "train must not give learning_rate"),
        ({"kind": "sweep", "tokens": [640, 1280]}, "must be one budget"),
        ({"train": {"batch_size": 2}}, "learning_rate"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump({**SET, **change}, sort_keys=False))
        with pytest.raises(ValueError, match=match):
            quality.sets.load_set(path)


@pytest.mark.slow
def test_every_form_trains(quality, one_thread):
    """Each model of the sets, small, gives finite gradients under autocast as the runs have it."""
    from muddformer.models import build_model
    from muddformer.training.modelling import make_config

    small = {"n_layer": 5, "dim": 32, "n_head": 2, "block_size": 16, "intermediate_size": 256}
    runs = [run for path in sorted(QUALITY.glob("runs/*.yaml")) for run in quality.sets.load_set(path).runs]
    forms = {str(model): model for model in ({**run.model, **small} for run in runs)}
    assert len(forms) == 18
    ids = torch.arange(33).reshape(3, 11) % 31
    for model in (build_model(make_config(fields, 31)) for fields in forms.values()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, ids)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_float8_history(quality):
    from muddformer.models import MUDDFormerConfig, build_model

    torch.manual_seed(0)
    x = (torch.randn(7, 64) * torch.tensor(10.0) ** torch.arange(-3, 4)[:, None]).requires_grad_()
    near = quality.float8_history.rounded(x)
    # Half of the last of 3 bits; below the smallest normal number, 2 ** -6 of a scale of 448, half of its last bit.
    bound = torch.maximum(x.detach().abs() / 16, x.detach().abs().amax(-1, keepdim=True) / 448 * 2**-10)
    assert ((near - x).abs() <= bound * 1.001).all() and not torch.equal(near, x)
    torch.testing.assert_close(quality.float8_history.rounded(near), near, rtol=1e-6, atol=0)
    near.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(quality.float8_history.rounded(torch.zeros(2, 4)), torch.zeros(2, 4))

    fields = {**SET["model"], "vocab_size": 31, "n_layer": 3}
    models = [build_model(MUDDFormerConfig(**fields, model_type=t)) for t in ("muddformer", "float8-history")]
    assert type(models[1]) is quality.float8_history.Float8History
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(models[0](ids), models[1](ids)), "fresh connections read the newest hidden state alone"
    with torch.no_grad():
        for da in (da for model in models for da in model.dynamic_dense):
            da.w2.weight.fill_(0.02)
    losses = [model(ids, ids) for model in models]
    assert losses[0] != losses[1] and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2)


def test_costs_are_interpolated_never_extrapolated(quality):
    points = [(1.0, 3.0), (2.25, 2.0), (4.0, 1.5), (16.0, 1.25)]
    assert quality.stats.cost_at_loss(points, 6**0.5) == pytest.approx(1.5)
    assert quality.stats.cost_at_loss(points, 3**0.5) == pytest.approx(3.0)
    assert quality.stats.cost_at_loss(points, 3.1) is quality.stats.cost_at_loss(points, 1.2) is None
    assert quality.stats.cost_at_loss(points, 1.4) is None  # the budgets around it are too far apart
    assert quality.stats.interval([1.0]) == (1.0, None)
    assert quality.stats.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5))


def test_pages_from_rows(quality, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths, rows = [], []
    for kind in quality.sets.KINDS:
        grid: dict = {}
        if kind in ("sweep", "stability"):
            grid = {"learning_rates": [1e-3, 2e-3], "train": {"batch_size": 2, "eval_batches": 2}}
        if kind == "time":
            goals = {"loss": 0.1, "tokens": 5000, "compute": 2.5, "seconds": 1.5}
            grid |= {"tokens": [640, 1280, 2560], "goals": goals}
        if kind == "ablation":
            grid |= {"order": list(SET["forms"]), "beside": ["mudd"]}
        path = tmp_path / f"{kind}.yaml"
        path.write_text(
            yaml.safe_dump({**SET, "kind": kind, "title": f"tiny {kind}", "seeds": [0, 1], **grid}, sort_keys=False)
        )
        paths.append(path)
        rows += [row for run in quality.sets.load_set(path).runs for row in _rows_of(quality, run)]
    rows = list({(row.run, row.step): row for row in rows}.values())
    quality.rows.write_rows(tmp_path / "rows.csv", rows)
    again = dataclasses.replace(rows[-1], held_out_loss=rows[-1].held_out_loss + 0.0125)
    quality.rows.write_rows(tmp_path / "repeats.csv", [again])
    arguments = [
        str(tmp_path / "rows.csv"),
        "--repeats",
        str(tmp_path / "repeats.csv"),
        "--sets",
        *map(str, paths),
        "--page",
        str(tmp_path / "docs" / "quality.md"),
        "--readme",
        str(tmp_path / "README.md"),
    ]
    assert quality.report.main(arguments) == 2
    assert "README.md has no <!-- quality -->" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("before\n<!-- quality -->\nold\n<!-- end quality -->\nafter\n")
    assert quality.report.main([*arguments, "--check"]) == 1
    assert quality.report.main(arguments) == 0
    assert quality.report.main([*arguments, "--check"]) == 0
    text = (tmp_path / "docs" / "quality.md").read_text()
    assert {path.name for path in (tmp_path / "docs").glob("*.png")} == {"quality_time.png", "quality_stability.png"}
    # MUDD at a budget has the loss of plain at twice the budget, and is 1.25 times as slow.
    assert "| MUDD | 0M | 2.800 ± 0.127 | 2 | -0.200 ± 0.000 | 1 | 1 ± 0 | 2.00 ± 0.00 | 1.60 ± 0.00 |" in text
    assert text.count("| - | - |") == 1, "the loss of the largest budget is out of plain's reach"
    assert "0.1 nats below plain after 0M tokens or more. At 0M: MUDD 0.200 ± 0.000: not measured at so many." in text
    assert "2.5 times the compute. At 0M: MUDD 2.000 ± 0.000: NOT reached" in text
    assert "1.5 times the seconds. At 0M: MUDD 1.600 ± 0.000: reached" in text
    told = (tmp_path / "README.md").read_text()
    assert told.startswith("before\n<!-- quality -->\n0M tokens of program source bring MUDD (tiny time) to")
    assert told.endswith("\n<!-- end quality -->\nafter\n") and "2.0 times the compute and 1.6 times" in told
    assert "-0.200 ± 0.000" in text and "**2.8" in text and text.count("| diverged by 0M tokens |") == 2
    assert "## Noise of the hardware" in text and f"| {again.held_out_loss:.4f} | 0.0125 |" in text


def test_an_advantage_of_means(quality, tmp_path):
    """Where a seed of the plain model lacks a budget."""
    path = tmp_path / "set.yaml"
    path.write_text(yaml.safe_dump({**SET, "seeds": [0, 1], "tokens": [640, 1280, 2560]}, sort_keys=False))
    run_set = quality.sets.load_set(path)
    runs = [run for run in run_set.runs if (run.form, run.tokens, run.seed) != ("plain", 2560, 1)]
    rows = [row for run in runs for row in _rows_of(quality, run)]
    result = quality.report.Results(run_set, rows)
    # 2.6 between the means 2.8 and 2.59 of plain.
    of_means = pytest.approx([2 ** (math.log(2.8 / 2.6) / math.log(2.8 / 2.59))])
    assert quality.report.advantage(result, "mudd", 1280, quality.report._flops) == of_means
    assert len(quality.report.advantage(result, "mudd", 640, quality.report._flops)) == 2
    assert quality.report.advantage(result, "mudd", 2560, quality.report._flops) == []
    with pytest.raises(ValueError, match="was made twice: step 5 of it"):
        quality.report.Results(run_set, [*rows, rows[0]])


def test_a_device_that_works_no_more_gets_no_run(quality, tiny_set, monkeypatch):
    def start(target, args, daemon):
        connection = multiprocessing.connection.Connection(os.dup(args[0].fileno()))
        return threading.Thread(target=target, args=(connection, *args[1:]), daemon=daemon)

    def trainer(device, settings):
        return lambda run: "failed: an error of the device" if device == "broken" else "finished"

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=start)
    monkeypatch.setattr(quality.run.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(quality.run, "_works", lambda device: device != "broken")
    monkeypatch.setattr(quality.run, "_trainer", trainer)
    tiny_set.write_text(yaml.safe_dump({**SET, "seeds": [0, 1, 2]}, sort_keys=False))
    runs = quality.sets.load_set(tiny_set).runs
    outcomes = quality.run.train_all(runs, ["broken", "good"], (), None)
    assert sorted(outcomes.values()) == ["failed: an error of the device", *["finished"] * (len(runs) - 1)]


def test_the_pages_are_what_the_rows_give(quality):
    assert quality.report.main([str(BENCHMARKS / "results" / "quality.csv"), "--check"]) == 0


@needs_dpkg
@pytest.mark.slow
def test_page_of_what_connections_learn(quality, made, tmp_path, tiny_set, capsys, one_thread):
    pytest.importorskip("matplotlib")
    runs, found = tmp_path / "out", tmp_path / "inspection.json"
    inspect = [str(runs), "--corpus", str(made), "--output", str(found), "--tokens", "64", "--device", "cpu"]
    train = [str(tiny_set), "--corpus", str(made), "--out", str(runs), "--device", "cpu"]
    assert quality.run.main(train) == 0
    assert quality.inspection.main(inspect) == 2
    assert "holds no checkpoints: run.py --keep" in capsys.readouterr().err
    (runs / "rows.csv").unlink()
    assert quality.run.main([*train, "--keep", "--checkpoint-every", "0"]) == 0, "of each step, but not to be kept"
    assert quality.inspection.main(inspect) == 0
    (tmp_path / "README.md").write_text("<!-- quality --><!-- end quality -->")
    page = ["--sets", str(tiny_set), "--page", str(tmp_path / "page.md"), "--inspection", str(found)]
    page += ["--readme", str(tmp_path / "README.md")]
    assert quality.report.main([str(runs / "rows.csv"), *page]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "## What the connections learn" in text and "| plain | " in text and "| MUDD | " in text
    pictures = {"quality_weights.png", "quality_similarities.png", "quality_sinks.png", "quality_norms.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}
    models = {model["form"]: model for model in json.loads(found.read_text())}
    assert list(models["mudd"]["norms"]) == ["256", "512", "768"] and models["mudd"]["tokens"] == 64
    assert models["plain"]["plan"] == {}
    found.write_text(found.read_text().replace(models["mudd"]["run"], "another"))
    assert quality.report.main([str(runs / "rows.csv"), *page]) == 2
    assert "in no set: another" in capsys.readouterr().err


def _rows_of(quality, run):
    doublings = {640: 0, 768: 0, 1280: 1, 2560: 2}[run.tokens] + (run.form == "mudd")
    loss = 3.0 - 0.2 * doublings + 0.02 * (run.seed - 0.5) + 10 * (run.learning_rate - 1e-3)
    slow = 1.25 if run.form == "mudd" else 1.0
    fast = run.form == "plain" and run.learning_rate == 2e-3
    diverged, dead = fast and run.seed == 1, fast and run.seed == 0
    for step, state in ((run.settings.steps // 2, ""), (run.settings.steps, "diverged" if diverged else "finished")):
        yield quality.rows.Row(
            run=run.id, size=run.size, form=run.form, learning_rate=run.learning_rate, budget=run.tokens, seed=run.seed,
            step=step, tokens=step * 64, seconds=run.tokens * slow / 640, loss=loss, loss_max=loss + 1,
            held_out_loss=loss, grad_norm=0.5, grad_norm_max=0.0 if dead else 2.0, state=state, parameters=1000,
            flops_per_token=1e12, corpus="c", device="GPU", torch="2", commit="abc", date="2026-01-01",
        )  # fmt: skip
