"""Directories with ``pytorch_model.bin``: read like the others, and refused before anything in them runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.models import make
from muddformer import MUDDFormer
from muddformer.models import from_pretrained

IDS = torch.arange(6)[None]
RELEASE = {
    "model_type": "muddformer", "n_layer": 2, "dim": 16, "n_head": 2, "n_local_heads": 2, "head_dim": 8,
    "vocab_size": 31, "intermediate_size": 256, "block_size": 12, "norm_eps": 1e-6, "use_qk_norm": True, "dense": True,
    "dynamic_dense": True, "dense_type": "qkvr", "sepln": True, "expand_last": True, "round64": True,
    "stack_hidden": False, "use_layer_cache": True,
}  # fmt: skip


def small_model() -> MUDDFormer:
    return make(n_layer=2, dim=16, n_head=2, vocab_size=31, intermediate_size=256, block_size=12, ffn_reallocation=True)


def write(folder: Path, state: object, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RELEASE))
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


def shard(folder: Path, state: dict[str, Tensor], **changed: object) -> Path:
    write(folder, {}).joinpath("pytorch_model.bin").unlink()
    files = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": {**weight_map, **changed}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_directory_of_the_release(tmp_path: Path) -> None:
    model = small_model()
    expected = model(IDS)
    for name, folder in {
        "single": write(tmp_path / "single", model.state_dict()),
        "before torch 1.6": write(tmp_path / "old", model.state_dict(), _use_new_zipfile_serialization=False),
        "of parameters": write(tmp_path / "parameters", dict(model.named_parameters())),
        "transposed views": write(tmp_path / "views", {n: v.t().contiguous().t() for n, v in model.state_dict().items()
                                                      if v.dim() < 3}),
        "shards": shard(tmp_path / "shards", model.state_dict()),
    }.items():  # fmt: skip
        loaded = from_pretrained(folder)
        assert torch.equal(loaded(IDS), expected), name
        assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    loaded = from_pretrained(tmp_path / "single", dtype=torch.bfloat16)
    (tmp_path / "single" / "pytorch_model.bin").write_bytes(b"")  # it has copies
    assert loaded(IDS).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "shards")  # safetensors come first
    (tmp_path / "shards" / "pytorch_model-00002-of-00002.bin").unlink()
    assert torch.equal(from_pretrained(tmp_path / "shards")(IDS), expected)


class Runs:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["value", "extra", "root"])
def test_pickles_with_code_run_nothing(tmp_path: Path, zipped: bool, place: str) -> None:
    mark, state = Runs(tmp_path / "ran"), small_model().state_dict()
    state = {"value": {**state, "norm.weight": mark}, "extra": {**state, "x": mark}, "root": mark}[place]
    folder = write(tmp_path / "model", state, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused before anything in it ran: .* posix\.mkdir"):
        from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


BAD_STATES = [
    ([1, 2], r"must hold tensors by name, got list"),
    ({1: torch.ones(1)}, r"must hold tensors by name"),
    (lambda s: {"state_dict": s}, r"state_dict must be an ordinary tensor with values, got (Ordered)?[dD]ict"),
    (lambda s: {**s, "epoch": 3}, r"epoch must be an ordinary tensor with values, got int"),
    (lambda s: {**s, "norm.weight": torch.ones(16).to_sparse()}, r"norm\.weight must be an ordinary tensor"),
    (lambda s: {**s, "norm.weight": torch.ones(16, device="meta")}, r"norm\.weight must be an ordinary tensor"),
    (lambda s: {**s, "norm.weight": torch.ones(16).long()}, r"norm\.weight must be of one of .* got torch\.int64"),
    (lambda s: {**s, "norm.weight": torch.ones(17)}, r"norm\.weight must have shape \[16\], got \[17\]"),
    (lambda s: {n: v for n, v in s.items() if n != "norm.weight"}, r"1 missing tensor\(s\) .*: norm\.weight"),
    (lambda s: {**s, "extra": torch.ones(1)}, r"1 unknown tensor\(s\) .*: extra"),
]


@pytest.mark.parametrize(("state", "match"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_bad_tensors(tmp_path: Path, state: object, match: str) -> None:
    folder = write(tmp_path / "model", state(small_model().state_dict()) if callable(state) else state)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: {match}"):
        from_pretrained(folder)


@pytest.mark.parametrize("damage", [
    lambda old: b"", lambda old: old[:200], lambda old: old[: len(old) // 2], lambda old: old[:-30],
    lambda old: b"PK\x03\x04" + b"\0" * 100, lambda old: b"\x80\x04\x95" + b"." * 100, lambda old: b"no pickle",
], ids=range(7))  # fmt: skip
def test_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    for zipped in (True, False):
        folder = write(tmp_path / "model", small_model().state_dict(), _use_new_zipfile_serialization=zipped)
        path = folder / "pytorch_model.bin"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: "):
            from_pretrained(folder)


def test_shards_that_lie_or_are_missing(tmp_path: Path) -> None:
    state = small_model().state_dict()
    folder = shard(tmp_path / "missing", state)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin: no such file"):
        from_pretrained(folder)
    folder = shard(tmp_path / "lie", state, **{"no.such": "pytorch_model-00001-of-00002.bin"})
    with pytest.raises(ValueError, match=r"no\.such is said to be in pytorch_model-00001-of-00002\.bin, which"):
        from_pretrained(folder)
    for target in ("../x.bin", "/etc/passwd", "x.safetensors", "a/b.bin", 3):
        folder = shard(tmp_path / "paths", state, **{"norm.weight": target})
        with pytest.raises(ValueError, match=r"bin\.index\.json: weight_map must name \.bin files beside it"):
            from_pretrained(folder)
