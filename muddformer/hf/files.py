"""Files of a model directory beside those that transformers writes, and checks of those that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .._files import write_atomically
from ..models.checkpoint import open_weights, read_config

__all__ = ["check_directory", "write_entry"]

_CODE = '''"""For ``trust_remote_code=True``: the classes of the installed package, pip install "muddformer[hf]"."""

from muddformer.hf import {names}

__all__ = [{quoted}]
'''
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- muddformer
---

# {name}

A {architecture} with Multiway Dynamic Dense connections ([arXiv 2502.12170](https://arxiv.org/abs/2502.12170)):
{n_layer} blocks of width {dim}, {n_head} heads, a context of {block_size} tokens, a vocabulary of {vocab_size},
{parameters:,} parameters.

```python
import muddformer.hf  # pip install "muddformer[hf]"; or trust_remote_code=True below
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

What it was trained on and how good it is: not said yet.
"""


def write_entry(directory: Any, model: PreTrainedModel) -> None:
    """Writes what makes a directory ready to be pushed.

    The code for ``trust_remote_code`` (two files that import the classes) and ``auto_map`` in the configuration, which
    names them; a model card (``README.md``) if there is none.
    """
    directory = Path(directory)
    if directory.is_file():
        return  # transformers says what is wrong
    directory.mkdir(parents=True, exist_ok=True)
    family = type(model).config_class.__name__.removesuffix("Config")
    names = {
        "configuration_muddformer": (f"{family}Config",),
        "modeling_muddformer": (family, f"{family}Model"),
    }
    for file, classes in names.items():
        text = _CODE.format(names=", ".join(classes), quoted=", ".join(f'"{name}"' for name in classes))
        write_text(directory / f"{file}.py", text)
    model.config.auto_map = {
        "AutoConfig": f"configuration_muddformer.{family}Config",
        "AutoModel": f"modeling_muddformer.{family}Model",
        "AutoModelForCausalLM": f"modeling_muddformer.{family}",
    }
    if not (directory / "README.md").exists():
        sizes = {name: getattr(model.config, name) for name in ("n_layer", "dim", "n_head", "block_size", "vocab_size")}
        count = sum(parameter.numel() for parameter in model.parameters())
        card = _CARD.format(name=directory.resolve().name, architecture=family, parameters=count, **sizes)
        write_text(directory / "README.md", card)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def check_directory(directory: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a local directory with missing shards, broken files, pickles with more than tensors (unread), or
    another vocabulary than the configuration's.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if not isinstance(directory, str | Path) or not Path(directory).is_dir():
        return
    if kwargs.get("state_dict") is not None or kwargs.get("variant") or kwargs.get("gguf_file"):
        return
    directory = Path(directory, kwargs.get("subfolder") or "")
    if (directory / "adapter_config.json").exists():
        return
    with open_weights(directory) as (path, tensors):
        expected = read_config(directory).get("vocab_size")
        embedding = tensors.get("tok_embeddings.weight")
        if embedding is None or kwargs.get("ignore_mismatched_sizes") or not isinstance(expected, int):
            return
        shape = [expected, *embedding.shape[1:]]
        if embedding.shape != shape:
            raise ValueError(f"{path}: tok_embeddings.weight must have shape {shape}, got {embedding.shape}")
