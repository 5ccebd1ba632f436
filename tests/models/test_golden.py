"""The models against cases computed by the public PyTorch release: every ``golden/*.safetensors`` is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import muddformer
from helpers.paths import TESTS
from muddformer import MUDDFormer, MUDDFormerConfig, build_model

CASES = sorted((TESTS / "golden").glob("*.safetensors"))


class Case:
    """One file: its tensors and a model with its weights."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.config = MUDDFormerConfig.from_official(
            {"model_type": metadata["model"], **json.loads(metadata["config"])}
        )
        if metadata.get("gelu") == "tanh":
            self.config = self.config.replace(gelu_approximate="tanh")

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def model(self, dtype: torch.dtype) -> MUDDFormer:
        model = build_model(self.config, dtype=dtype)
        model.load_state_dict(self.group("param/"), strict=True)
        return model

    def run(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logits, loss and all gradients, in float64."""
        model = self.model(dtype)
        logits = model(self.tensors["input_ids"])
        loss = model(self.tensors["input_ids"], self.tensors["targets"])
        loss.backward()
        found = {"logits": logits, "loss": loss.reshape(1)}
        found |= {f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
        return {name: value.detach().double() for name, value in found.items()}


@pytest.fixture(params=CASES, ids=lambda path: path.stem, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_there_are_cases() -> None:
    assert {"muddformer_tiny", "muddpythia_tiny"} <= {path.stem for path in CASES}


def test_logits_loss_and_gradients(case: Case) -> None:
    found, exact = case.run(torch.float32), case.run(torch.float64)
    expected = {name: case.tensors[name].double() for name in found}
    assert {name for name in case.tensors if name.startswith("grad/")} == {n for n in found if n.startswith("grad/")}
    for name, value in expected.items():
        scale = value.abs().max()
        # A case has rounding errors of its own, which its random priors amplify: its gradients are up to 5e-5 from the
        # float64 ones. Where that is more than 1e-5, float32 has to be as near to it as two such errors allow.
        rounding = (value - exact[name]).abs().max()
        assert rounding <= 1e-4 * scale, name
        assert (found[name] - value).abs().max() <= max(1e-5 * scale, 2 * rounding), name
        assert (found[name] - exact[name]).abs().max() <= max(1e-5 * scale, 1.5 * rounding), name
    grads = [name for name in found if name.startswith("grad/")]
    largest = max(expected[name].abs().max() for name in grads)
    assert max((found[name] - expected[name]).abs().max() for name in grads) <= 1e-5 * largest
    for name in ("logits", "loss"):
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_greedy_tokens(case: Case) -> None:
    prompt, expected = case.tensors["prompt"], case.tensors["greedy_ids"]
    tokens = muddformer.generate(
        case.model(torch.float32), prompt, max_new_tokens=expected.shape[1] - prompt.shape[1], temperature=0
    )
    assert torch.equal(tokens, expected)


def test_checkpoint_directory_of_the_release(case: Case, tmp_path: Path) -> None:
    """What ``from_pretrained`` makes of the release's own files."""
    official = {"model_type": case.config.model_type, "dynamic_dense": True, "dense_type": "qkvr", "n_local_heads": -1}
    for name in ("n_layer", "dim", "n_head", "vocab_size", "intermediate_size", "block_size", "use_qk_norm", "round64"):
        official[name] = getattr(case.config, name)
    official |= {"expand_last": case.config.expand_last, "architectures": ["MUDDFormer"], "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(official))
    save_file(case.group("param/"), tmp_path / "model.safetensors")
    model = MUDDFormer.from_pretrained(tmp_path)
    logits = model(case.tensors["input_ids"])
    assert (logits - case.tensors["logits"]).abs().max() <= 1e-5 * case.tensors["logits"].abs().max()
