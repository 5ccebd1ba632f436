"""The C++ models compute what the Python models compute: same weights in, same logits, loss and gradients out.

Never skipped: a C++ compiler is a requirement of these tests. tests/cpp/parity.cpp is compiled against the installed
package and given a file for every variant of the models.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.cpp_program import build_program
from helpers.models import SMALL, VARIANTS, make, scramble, some_ids
from helpers.paths import TESTS
from muddformer import MUDDFormer, MUDDFormerConfig
from muddformer.models import KVCache

SOURCE = TESTS / "cpp" / "parity.cpp"
CASES = dict.fromkeys(VARIANTS, torch.float32)
CASES |= {f"{name}-bfloat16": torch.bfloat16 for name in ("default", "pythia", "pre-post")}


def make_case(case: str) -> tuple[MUDDFormer, Tensor, Tensor]:
    """A model with weights that all count, and a batch; the same at every call."""
    torch.manual_seed(sorted(CASES).index(case))
    model = scramble(make(case.removesuffix("-bfloat16"))).to(CASES[case])
    return model, some_ids(length=16), some_ids(length=16)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what C++ computed of every case."""
    folder = tmp_path_factory.mktemp("parity")
    program = build_program(SOURCE, folder / "program")
    for case in CASES:
        model, ids, targets = make_case(case)
        tensors = {f"param/{name}": value.detach() for name, value in model.named_parameters()}
        tensors |= {"input_ids": ids, "targets": targets}
        config = json.dumps(model.config.to_dict())
        save_file(tensors, folder / f"{case}.safetensors", metadata={"config": config})
    command = [str(program), "1", *(str(folder / case) for case in CASES)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, one_thread: None) -> str:
    """A case's name. On one thread, because the number of threads decides the order of sums."""
    return request.param


def read(folder: Path, case: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / f"{case}.result.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@torch.no_grad()
def decode(model: MUDDFormer, ids: Tensor) -> Tensor:
    length, prompt = ids.shape[1], ids.shape[1] // 2
    cache = KVCache(model.config, ids.shape[0], length, dtype=model.tok_embeddings.weight.dtype)
    parts = [model(ids[:, :prompt], cache=cache)]
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(prompt, length)]
    return torch.cat(parts, dim=1)


def test_logits_loss_and_gradients(results: Path, case: str) -> None:
    """Equal to the last bit, because the same kernels run in the same order."""
    found, metadata = read(results, case)
    model, ids, targets = make_case(case)
    loss = model(ids, targets)
    loss.backward()
    expected = {"logits": model(ids), "loss": loss}
    if model.config.causal:
        expected["decoded"] = decode(model, ids)
    expected |= {f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name in found if not name.startswith("fresh/")} == expected.keys()
    for name, value in expected.items():
        value = value.detach()
        assert found[name].dtype == value.dtype, name
        difference = (found[name].double() - value.double()).abs().max().item()
        assert torch.equal(found[name], value), f"{name}: differs by {difference:g} of {value.abs().max().item():g}"
    assert metadata["config"] == json.dumps(model.config.to_dict(), indent=2)


def test_equal_seeds_give_equal_models(results: Path, case: str) -> None:
    found, _ = read(results, case)
    model = make_case(case)[0]
    torch.manual_seed(0)
    model.reset_parameters()
    assert {n for n in found if n.startswith("fresh/")} == {f"fresh/{n}" for n, _ in model.named_parameters()}
    for name, value in model.named_parameters():
        assert torch.equal(found[f"fresh/{name}"], value), name


def test_cases_span_the_variants() -> None:
    assert len(CASES) >= 12
    fields = MUDDFormerConfig(**SMALL).to_dict().keys() - SMALL.keys()
    varied = {field for changes in VARIANTS.values() for field in changes}
    assert fields - varied == {"norm_eps", "rope_base", "initializer_range"}
