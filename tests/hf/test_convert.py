"""Checkpoint directories from one layout to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

import muddformer.hf  # noqa: F401  (registers our models with transformers)
from helpers.models import make, scramble
from helpers.paths import PACKAGE
from muddformer import MUDDFormer, from_pretrained
from muddformer.models import convert as module
from muddformer.models.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(20)[None] % 61
FOREIGN = {
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500}),
    "neox-tanh-tied": ("GPTNeoX", {"hidden_act": "gelu_new", "tie_word_embeddings": True, "layer_norm_eps": 1e-3}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-grouped": ("Llama", {"num_key_value_heads": 2, "rope_theta": 500.0, "head_dim": 8}),
    "llama-biased-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}


def other_model(kind: str, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny model of transformers whose every parameter counts."""
    name, options = FOREIGN[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, max_position_embeddings=24, **{**options, **changes})
    torch.manual_seed(seed)
    return scramble(getattr(transformers, f"{name}ForCausalLM")(config), 0.1).eval()


def make_shards(folder: Path, count: int, pickled: bool = False) -> list[str]:
    """Splits ``model.safetensors``, and makes pickles of the shards if asked to."""
    state, (stem, end) = load_file(folder / "model.safetensors"), ("model", "safetensors")
    (folder / "model.safetensors").unlink()
    if pickled:
        stem, end = "pytorch_model", "bin"
    files = [f"{stem}-{i:05}-of-{count:05}.{end}" for i in range(1, count + 1)]
    weight_map = {name: files[i * count // len(state)] for i, name in enumerate(state)}
    for file in files:
        shard = {name: state[name] for name in state if weight_map[name] == file}
        torch.save(shard, folder / file) if pickled else save_file(shard, folder / file)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def the_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------ other architectures


@pytest.mark.parametrize("kind", FOREIGN)
@torch.no_grad()
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    other = other_model(kind)
    expected = other(IDS).logits
    other.save_pretrained(tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "plain")
    plain = from_pretrained(tmp_path / "plain")
    assert not plain.config.dense and plain.config.block_size == 24
    torch.testing.assert_close(plain(IDS), expected, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "other", tmp_path / "mudd", connections={})
    mudd = from_pretrained(tmp_path / "mudd")
    assert mudd.config.dense and mudd.config.plain_twin() == plain.config
    assert torch.equal(mudd(IDS), plain(IDS))


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_norm": True, "post_norm": "residual"},
        {"multiway": False},
        {"separate_norms": False, "cap": 10.0},
        {"source_stride": 2, "block_stride": 2, "ways": "kvr"},
    ],
    ids=str,
)
@torch.no_grad()
def test_fresh_connections_of_every_kind(fields: dict, tmp_path: Path) -> None:
    other = other_model("llama")
    other.save_pretrained(tmp_path / "other")
    config = convert(tmp_path / "other", tmp_path / "mudd", connections=fields, seed=3)
    mudd = from_pretrained(tmp_path / "mudd")
    assert mudd.config == config and all(getattr(config, name) == value for name, value in fields.items())
    torch.testing.assert_close(mudd(IDS), other(IDS).logits, rtol=1e-5, atol=1e-5)
    # They can be trained on: all of the new parameters that a fresh model has gradients for have some here.
    with torch.enable_grad():
        mudd(IDS, IDS).backward()
    assert all(parameter.grad is not None for parameter in mudd.parameters())
    for number, seed in enumerate((3, 4)):
        convert(tmp_path / "other", tmp_path / str(number), connections=fields, seed=seed)
    same, changed = (from_pretrained(tmp_path / name).state_dict() for name in ("0", "1"))
    assert the_same(mudd.state_dict(), same)
    assert not the_same(mudd.state_dict(), changed)


@torch.no_grad()
def test_a_plain_twin_gets_connections(tmp_path: Path) -> None:
    plain = scramble(make("plain-pythia"))
    plain.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "mudd", connections={})
    mudd = from_pretrained(tmp_path / "mudd")
    assert mudd.config == plain.config.replace(dense=True)
    assert torch.equal(mudd(IDS), plain(IDS))


def test_old_checkpoints_of_transformers(tmp_path: Path) -> None:
    """Heads of other names, tables among the weights, keys from before version 5, half precision, pickled shards."""
    other = other_model("neox").to(torch.bfloat16)
    other.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    head = next(name for name in state if name in ("embed_out.weight", "lm_head.weight"))
    state["embed_out.weight"] = state.pop(head)
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention"
        state[f"{prefix}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        state[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors")
    keys = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "attention_bias"):
        keys.pop(name, None)
    keys.update(rotary_pct=0.25, rotary_emb_base=10000, rope_scaling=None)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    make_shards(tmp_path, 2, pickled=True)
    convert(tmp_path, tmp_path / "ours")
    ours = from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.bfloat16 and ours.output is not None
    assert torch.equal(ours.output.weight, other.get_output_embeddings().weight)
    torch.testing.assert_close(ours(IDS), other(IDS).logits, rtol=0.05, atol=0.05)


def test_loading_one_of_them_as_ours_says_how(tmp_path: Path) -> None:
    other_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'llama': muddformer convert makes such a checkpoint of it"):
        from_pretrained(tmp_path)


REFUSED = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type must be 'default'.* got 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type must be .* got 'llama3'"),
    ("llama", {"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
    ("llama", {"attention_bias": True}, "attention_bias and mlp_bias must be equal, got True and False"),
    ("llama", {"head_dim": 16}, "head_dim must be hidden_size / num_attention_heads, got 16 with 32 / 4"),
    ("llama", {"hidden_act": "relu"}, "hidden_act must be 'silu' .* got 'relu'"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_heads must divide n_head"),
    ("llama", {"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
    ("llama", {"hidden_size": None}, "hidden_size must be an integer, got None"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config must be None"),
    ("llama", {"model_type": "mistral"}, "model_type must be one of muddformer, .*llama, got 'mistral'"),
    ("llama", {"model_type": 3}, "model_type must be one of .* got 3"),
    ("llama", {"model_type": "gpt_neox"}, "hidden_act must be 'gelu'.* got 'silu'"),
    ("llama", {"model_type": None}, "unknown key"),
    ("llama", {"num_hidden_layers": 4}, "missing tensor.*layers.3"),
    ("llama", {"num_hidden_layers": 2}, r"unknown tensor.*layers\.2"),
    ("llama", {"intermediate_size": 47}, r"feed_forward.* must have shape"),
    ("llama", {"vocab_size": 60}, r"must have shape \[60, 32\], got \[61, 32\]"),
    ("neox", {"attention_bias": False}, "attention_bias must be True .* got False"),
    ("neox", {"hidden_act": "relu"}, "hidden_act must be 'gelu'"),
    ("neox", {"hidden_size": 64}, "does not have the shape of config.json"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("llama", "neox"):
        other_model(kind).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize(("kind", "changes", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_expressible(kind: str, changes: dict, match: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    os.link(saved / kind / "model.safetensors", folder / "model.safetensors")
    keys = json.loads((saved / kind / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, **changes}))
    with pytest.raises(ValueError, match=match) as caught:
        convert(folder, tmp_path / "ours")
    assert str(folder) in str(caught.value)
    assert os.listdir(tmp_path) == ["other"]


# ----------------------------------------------------------------------------------------------- layouts, files, shards


@pytest.mark.parametrize("variant", ["default", "pythia", "mqa-tied", "pre-post-all", "stride-2x2", "plain", "tanh"])
def test_to_the_other_layout_and_back(variant: str, tmp_path: Path) -> None:
    model = scramble(make(variant)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "a" / "training.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b", layout="hf")
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    keys = json.loads((tmp_path / "b" / "config.json").read_text())
    assert keys["dense_type"] in ("qkvr", "l") and MUDDFormer.config_class.is_official(keys)
    convert(tmp_path / "b", tmp_path / "c")
    for name in ("b", "c"):
        loaded = from_pretrained(tmp_path / name)
        assert loaded.config == model.config and the_same(loaded.state_dict(), model.state_dict())
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "c" / "config.json").read_text()


@pytest.mark.parametrize("variant", ["default", "pythia", "pre-post-all", "mqa-tied", "plain"])
@torch.no_grad()
def test_transformers_reads_the_other_layout(variant: str, tmp_path: Path) -> None:
    """And what it saves comes back."""
    model = scramble(make(variant)).eval()
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", layout="hf", max_shard_bytes=30_000)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(other).__module__.startswith("muddformer.hf") and torch.equal(other(IDS).logits, model(IDS))
    other.save_pretrained(tmp_path / "c", max_shard_size="30KB")
    assert convert(tmp_path / "c", tmp_path / "d") == model.config
    assert the_same(from_pretrained(tmp_path / "d").state_dict(), model.state_dict())


def test_pickles_and_shards(tmp_path: Path) -> None:
    model = scramble(make())
    model.save_pretrained(tmp_path / "a")
    make_shards(tmp_path / "a", 3, pickled=True)
    seen = []
    convert(tmp_path / "a", tmp_path / "b", max_shard_bytes=30_000, progress=lambda *counts: seen.append(counts))
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size <= 32_000 for path in (tmp_path / "b").glob("*.safetensors"))
    total = sum(value.nbytes for value in model.state_dict().values())
    assert seen == sorted(seen) and seen[-1] == (total, total)
    assert the_same(from_pretrained(tmp_path / "b").state_dict(), model.state_dict())
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total and set(index["weight_map"].values()) == set(files)
    convert(tmp_path / "b", tmp_path / "c")
    assert sorted(os.listdir(tmp_path / "c")) == ["config.json", "model.safetensors"]
    model.save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "d", max_shard_bytes=1)
    assert len(list((tmp_path / "d").glob("*.safetensors"))) == len(model.state_dict())


def test_dtype(tmp_path: Path) -> None:
    model = scramble(make("plain"))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16, connections={})
    loaded = from_pretrained(tmp_path / "b")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.norm.weight, model.norm.weight.bfloat16())
    with torch.no_grad():
        model.norm.weight[3] = 1e6
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"those of norm\.weight are too large for float16"):
        convert(tmp_path / "a", tmp_path / "c", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        convert(tmp_path / "a", tmp_path / "e", dtype=torch.int8)


def test_tied_heads(tmp_path: Path) -> None:
    model = make("mqa-tied")
    model.save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    save_file({**state, "output.weight": state["tok_embeddings.weight"].clone()}, tmp_path / "a" / "model.safetensors")
    convert(tmp_path / "a", tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == state.keys()
    save_file({**state, "output.weight": state["tok_embeddings.weight"] + 1}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=r"output\.weight differs from tok_embeddings\.weight"):
        convert(tmp_path / "a", tmp_path / "c")


MEMORY = """
import torch
from muddformer.models.convert import convert
from muddformer.training.metrics import peak_memory_mib
cpu = torch.device("cpu")
for number, options in enumerate(({}, {"dtype": torch.bfloat16})):
    before = peak_memory_mib(cpu)
    convert("a", str(number), **options)
    print(peak_memory_mib(cpu) - before)
"""


@pytest.mark.parametrize("pickled", [True, False])
def test_memory(pickled: bool, tmp_path: Path) -> None:
    """Beside Python and torch far less than a shard: parts of a tensor, and no pages of a mapping."""
    make("plain", n_layer=1, dim=256, vocab_size=2**16).save_pretrained(tmp_path / "a")
    files = make_shards(tmp_path / "a", 3, pickled=pickled)
    largest = max((tmp_path / "a" / file).stat().st_size for file in files) / 2**20
    assert 60 < largest < 140
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, env=environment, capture_output=True, text=True)
    copied, cast = map(float, done.stdout.split())
    assert copied < 0.5 * largest and copied + cast < 0.75 * largest
    assert the_same(from_pretrained(tmp_path / "0").state_dict(), from_pretrained(tmp_path / "a").state_dict())


# ----------------------------------------------------------------------------------------------- interruption, refusals


class Interrupted(Exception):
    pass


def stop_after(count: int):
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > count:
            raise Interrupted

    return progress


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scramble(make())
    model.save_pretrained(tmp_path / "a")
    options = {"max_shard_bytes": 30_000}
    with pytest.raises(Interrupted):
        convert(tmp_path / "a", tmp_path / "b", progress=stop_after(40), **options)
    assert not (tmp_path / "b").exists()
    partial = tmp_path / "b.partial"
    (partial / ".model-x.safetensors.1.tmp").write_bytes(b"of a process that was killed")
    there = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert there and not (partial / "config.json").exists()
    for changes in ({"max_shard_bytes": 40_000}, {"dtype": torch.float64}, {"layout": "hf"}):
        with pytest.raises(FileExistsError, match=r"b\.partial is of another conversion"):
            convert(tmp_path / "a", tmp_path / "b", **{**options, **changes})
    written = []
    monkeypatch.setattr(module, "write_tensors", lambda path, *rest: written.append(path.name) or real(path, *rest))
    convert(tmp_path / "a", tmp_path / "b", **options)
    assert not partial.exists() and written and there.keys().isdisjoint(written)
    assert not [name for name in os.listdir(tmp_path / "b") if not name.startswith(("model", "config"))]
    assert the_same(from_pretrained(tmp_path / "b").state_dict(), model.state_dict())


def test_a_conversion_that_was_killed_at_its_beginning(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "a")
    partial = tmp_path / "b.partial"
    partial.mkdir()
    for name in (".conversion.json.1.tmp", "conversion.lock"):
        (partial / name).write_text("1")
    convert(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]


real = module.write_tensors


def test_a_changed_source_begins_anew(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "a")
    with pytest.raises(Interrupted):
        convert(tmp_path / "a", tmp_path / "b", progress=stop_after(10), max_shard_bytes=10_000)
    scramble(make()).save_pretrained(tmp_path / "a")
    with pytest.raises(FileExistsError, match="another conversion"):
        convert(tmp_path / "a", tmp_path / "b", max_shard_bytes=10_000)


def test_a_conversion_that_stopped_at_its_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "sync", interrupted)
        convert(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileExistsError, match="of another conversion"):
        convert(tmp_path / "a", tmp_path / "b", dtype=torch.float64)
    convert(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]


def interrupted(*_: object) -> None:
    raise Interrupted


def test_links_and_the_current_folder_as_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        convert(tmp_path / "a", tmp_path / f"to-{name}")
        assert (tmp_path / f"to-{name}").is_symlink() and (tmp_path / name / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(tmp_path / "a", ".")
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_targets_that_are_there(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "a")
    before = sorted(os.listdir(tmp_path / "a"))
    for target in (tmp_path / "a", tmp_path / "a" / "config.json"):
        with pytest.raises(FileExistsError, match="is there already"):
            convert(tmp_path / "a", target)
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"b\.partial is there already and is no conversion"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").mkdir()
    convert(tmp_path / "a", tmp_path / "c")  # an empty folder is as good as none
    assert sorted(os.listdir(tmp_path / "a")) == before == sorted(os.listdir(tmp_path / "c"))


def test_two_at_once_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "a")

    def again(done: int, total: int) -> None:
        with pytest.raises(BlockingIOError, match=r"b\.partial: process \d+ is making it"):
            convert(tmp_path / "a", tmp_path / "b")

    convert(tmp_path / "a", tmp_path / "b", progress=again)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"c\.partial: .* GB are needed, more than the disk has left"):
        convert(tmp_path / "a", tmp_path / "c")


def test_bad_sources_and_arguments(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "a")
    for options, match in (
        ({"layout": "gguf"}, "layout must be one of muddformer, hf, got 'gguf'"),
        ({"connections": {}}, "only a model without connections can be given some"),
    ):
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "a", tmp_path / "b", **options)
    make("plain").save_pretrained(tmp_path / "plain")
    for fields, match in (
        ({"pre_norm": True}, "post_norm must be 'residual' or 'all' with pre_norm=True, got 'none'"),
        ({"cap": 1.0}, "cap must be more than 1, got 1:"),
        ({"gelu_approximate": "tanh"}, "unknown key 'gelu_approximate'"),
        ({"dense": False}, "unknown key 'dense'"),
        ({"dim": 3}, "unknown key 'dim'"),
        ({"ways": "x"}, "ways must be"),
    ):
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "plain", tmp_path / "b", connections=fields)
    missing = make_shards(tmp_path / "a", 2)[1]
    (tmp_path / "a" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing}: no such file"):
        convert(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no such file, nor its directory"):
        convert(tmp_path / "nothing", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "plain"]
