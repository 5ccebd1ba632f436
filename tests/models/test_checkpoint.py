"""Checkpoint directories: round trips, and files that are broken, foreign or hostile."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.models import make
from helpers.paths import PACKAGE
from muddformer import MUDDFormer
from muddformer._files import write_atomically
from muddformer.models import from_pretrained, load_config, save_pretrained
from muddformer.models.stored import StoredTensor
from muddformer.models.writing import write_tensors

IDS = torch.arange(6)[None]


def small_model() -> MUDDFormer:
    return make(n_layer=2, dim=16, n_head=2, vocab_size=31, intermediate_size=24, block_size=12)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("variant", ["default", "plain", "pythia", "mqa-tied", "pre-post-all", "stride-2x2", "cap"])
def test_round_trip(variant: str, tmp_path: Path) -> None:
    model = make(variant)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    loaded = MUDDFormer.from_pretrained(str(tmp_path / "a" / "b"))
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(IDS), model(IDS))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded(IDS, IDS).backward()


def test_dtype_and_device(directory: Path) -> None:
    model = from_pretrained(directory, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(directory)
    assert {p.dtype for p in from_pretrained(directory).parameters()} == {torch.bfloat16}
    assert model.rotary.cos.dtype == torch.float32
    with pytest.raises(TypeError, match=r"dtype must be a floating point torch.dtype, got torch.int8"):
        from_pretrained(directory, dtype=torch.int8)


def test_loaded_model_does_not_need_the_file(directory: Path) -> None:
    model = from_pretrained(directory)
    expected = model(IDS)
    (directory / "model.safetensors").write_bytes(b"")
    assert torch.equal(model(IDS), expected)


def test_loading_does_not_import_the_compiler(directory: Path) -> None:
    """Arithmetic and random numbers on the meta device, where a model is made first, would: that takes seconds."""
    program = "import sys, muddformer; model = muddformer.from_pretrained(sys.argv[1]); "
    program += "assert model.rotary.cos[1].min() < 1; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, str(directory)], env={**os.environ, "PYTHONPATH": PACKAGE})
    assert done.returncode == 0


def test_failed_save_leaves_the_old_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        small_model().save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_bad_save(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a MUDDFormer, got Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="its parameters are on the meta device"):
        save_pretrained(small_model().to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_shards(directory: Path) -> None:
    expected = from_pretrained(directory)(IDS)
    names = shard(directory)
    assert torch.equal(from_pretrained(directory)(IDS), expected)
    (directory / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-1\.safetensors: no such file"):
        from_pretrained(directory)


def shard(directory: Path, **changed: object) -> list[str]:
    """Splits ``model.safetensors`` in two and writes an index, with some entries of its weight_map changed."""
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"shard-{i}.safetensors" for i in range(2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        save_file({name: value for name, value in state.items() if weight_map[name] == file}, directory / file)
    index = {"weight_map": {**weight_map, **changed}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize(
    "target",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "c:x.safetensors", "x.bin", "", 3,
     None, "nul\0.safetensors", ["a.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_index_stays_in_its_directory(directory: Path, target: object) -> None:
    shard(directory, **{"norm.weight": target})
    with pytest.raises(ValueError, match=r"index\.json: weight_map must name \.safetensors files beside it"):
        from_pretrained(directory)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", "\udcff", "[" * 10**5])
def test_bad_index(directory: Path, text: str) -> None:
    shard(directory)
    (directory / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        from_pretrained(directory)


def test_index_that_lies(directory: Path) -> None:
    shard(directory, **{"no.such": "shard-0.safetensors"})
    with pytest.raises(ValueError, match=r"no\.such is said to be in shard-0\.safetensors, which does not have it"):
        from_pretrained(directory)


def edit_config(**changes: object) -> Callable[[bytes], bytes]:
    return lambda old: json.dumps({**json.loads(old), **changes}).encode()


BAD_CONFIGS = [
    (lambda _: b"", "not valid JSON"),
    (lambda old: old[:-20], "not valid JSON"),
    (lambda _: b"\xff\xfe{}", "not valid JSON"),
    (lambda _: b"[" * 10**5, "not valid JSON"),
    (lambda _: b'{"dim": ' + b"9" * 10**5 + b"}", "config.json: "),
    (lambda _: b"null", "must hold a JSON object, got NoneType"),
    (lambda _: b"[1]", "must hold a JSON object, got list"),
    (lambda old: old + b" " * 2**20, "bytes are too many"),
    (edit_config(hidden_size=4), "unknown key 'hidden_size'"),
    (edit_config(dim="16"), "dim must be an integer, got '16'"),
    (edit_config(dim=16.0), "dim must be an integer, got 16.0"),
    (edit_config(norm_eps=float("nan")), "not valid JSON: NaN is no number"),
    (edit_config(cap=float("inf")), "not valid JSON: Infinity is no number"),
    (edit_config(n_layer=10**9), "n_layer must be from 1 to 1024"),
    (edit_config(ways="__class__"), "ways must be a part of 'qkvr'"),
    (edit_config(n_layer=1000), "too few for n_layer=1000"),
    (edit_config(n_layer=3), r"missing tensor\(s\) for this configuration: .*layers\.2\."),
    (edit_config(n_layer=1), r"unknown tensor\(s\) for this configuration: "),
    (edit_config(norm="layer"), r"missing tensor\(s\)"),
    (edit_config(feed_forward="gelu"), r"unknown tensor\(s\)"),
    (edit_config(dim=32), r"must have shape \[.*\], got \["),
    (edit_config(vocab_size=2**31 - 1, dim=2**20, n_head=2**16), r"model\.safetensors: .* must have shape"),
    (edit_config(block_size=2**22), None),
    (edit_config(dense=False), r"1 missing tensor\(s\) .*: layers\.1\.attention_norm\.weight"),
    (edit_config(tie_word_embeddings=True), r"output\.weight differs from tok_embeddings\.weight"),
]


@pytest.mark.parametrize(("edit", "match"), BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_bad_config(directory: Path, edit: Callable[[bytes], bytes], match: str | None) -> None:
    path = directory / "config.json"
    path.write_bytes(edit(path.read_bytes()))
    if match is None:
        assert from_pretrained(directory).config.block_size == 2**22
        return
    with pytest.raises(ValueError, match=match) as caught:
        from_pretrained(directory)
    assert str(directory) in str(caught.value)


def rename(state: dict) -> dict:
    return {("model." + name): value for name, value in state.items()}


BAD_STATES = [
    (lambda s: {}, "0 tensors are too few"),
    (lambda s: {**s, "extra": torch.ones(1)}, r"1 unknown tensor\(s\) for this configuration: extra"),
    (lambda s: {n: v for n, v in s.items() if n != "norm.weight"}, r"1 missing tensor\(s\) .*: norm\.weight"),
    (rename, r"missing tensor\(s\) .*, \.\.\."),
    (lambda s: {**s, "norm.weight": torch.ones(17)}, r"norm\.weight must have shape \[16\], got \[17\]"),
    (lambda s: {**s, "norm.weight": torch.ones(1, 16)}, r"norm\.weight must have shape \[16\], got \[1, 16\]"),
    (lambda s: {**s, "norm.weight": torch.ones(16).long()}, r"norm\.weight must be of one of .* got I64"),
    (lambda s: {**s, "norm.weight": torch.ones(16).bool()}, r"norm\.weight must be of one of .* got BOOL"),
]


@pytest.mark.parametrize(("edit", "match"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_bad_tensors(directory: Path, edit: Callable[[dict], dict], match: str) -> None:
    path = directory / "model.safetensors"
    save_file(edit(load_file(path)), path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {match}" if match[0].isdigit() else match):
        from_pretrained(directory)


def header(text: str, size: int | None = None) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data) if size is None else size) + data


BAD_FILES = [
    b"",
    b"\0" * 7,
    b"\0" * 8,
    b"PK\x03\x04" + b"\0" * 100,
    b"\x80\x04\x95" + b"." * 100,
    header("{}", 2**63),
    header("{}", 2**40),
    header("{}", 1),
    header("[]"),
    header('{"norm.weight": 3}'),
    header('{"norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}'),
    header('{"norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}') + b"\0" * 64,
    header('{"norm.weight": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 64]}}'),
    header('{"norm.weight": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}') + b"\0" * 64,
    header('{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, '
           '"b": {"dtype": "F32", "shape": [16], "data_offsets": [32, 96]}}') + b"\0" * 96,
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(directory: Path, data: bytes) -> None:
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        from_pretrained(directory)


def test_missing_files(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json: no such file"):
        from_pretrained(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        from_pretrained(directory)
    (directory / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        from_pretrained(directory)
    assert load_config(directory) == small_model().config
    with pytest.raises(TypeError):
        from_pretrained(None)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    torch.manual_seed(0)
    make(n_layer=1, dim=8, n_head=2).save_pretrained(directory)
    return directory


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_harmless(intact: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Cut or changed bytes give a ValueError, or a model where only values of weights changed."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((intact / name).read_bytes())
    path = tmp_path / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        place = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        model = from_pretrained(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)
    else:
        assert model(torch.zeros(1, 1, dtype=torch.int64)).shape[:2] == (1, 1)


def test_a_source_that_cannot_be_read_is_what_is_named(tmp_path: Path) -> None:
    for missing in (tmp_path / "other" / "source", tmp_path / "source"):
        with pytest.raises(FileNotFoundError) as caught:
            write_atomically(tmp_path / "target", lambda scratch, missing=missing: shutil.copyfile(missing, scratch))
        assert caught.value.filename == str(missing)
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "no folder" / "target", lambda scratch: scratch.write_text("text"))
    assert caught.value.filename == str(tmp_path / "no folder" / "target")
    assert not list(tmp_path.iterdir())


def test_a_source_that_ends_early_is_what_is_named(directory: Path, tmp_path: Path) -> None:
    """A file that is cut while it is converted; the tensors are mapped, so that they are read from the file itself."""
    source = directory / "model.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        with safe_open(source, "pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = {torch.float32: "F32", torch.bfloat16: "BF16"}
            tensors = {
                name: StoredTensor(list(value.shape), names[dtype], lambda value=value: value)
                for name, value in values.items()
            }
            whole = source.read_bytes()
            os.truncate(source, 4096)
            with pytest.raises(OSError, match="ends before its tensors do") as caught:
                write_tensors(tmp_path / "target.safetensors", tensors, lambda count: None)
            assert caught.value.filename == str(source)
            assert not list(tmp_path.glob("*target*"))
            with source.open("r+b") as again:  # the same file, or the mapping would be of another
                again.write(whole)
