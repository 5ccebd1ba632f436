"""README.md and the pages of docs/: what they name exists, README is short and runs, public names are documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import muddformer
from helpers.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
FILE = re.compile(r"`((?:csrc|muddformer|tests|benchmarks|docs|examples|\.ci)/[\w./-]+)`")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_exists(page: Path) -> None:
    for link, anchor in LINK.findall(page.read_text()):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """But for those that adding.md tells to make: they have my_ in their name."""
    names = [name for name in FILE.findall(page.read_text()) if "my_" not in name]
    assert not [name for name in names if not (ROOT / name).exists()]


def test_readme_is_short_and_begins_with_code() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("```python") for line in lines[:40])


def test_pages_are_in_the_table_of_contents() -> None:
    listed = set()
    for index in (ROOT / "docs/index.md", ROOT / "docs/kernels/index.md"):
        for names in re.findall(r"^:::\{toctree\}\n(.*?)^:::$", index.read_text(), re.DOTALL | re.MULTILINE):
            listed |= {index.parent / name for name in names.splitlines() if name and not name.startswith(":")}
    pages = {page.with_suffix("") for kind in ("md", "rst") for page in (ROOT / "docs").rglob(f"*.{kind}")}
    assert pages - {ROOT / "docs/index"} == listed


@pytest.mark.parametrize("page", [README, ROOT / "docs/python.md"], ids=["README.md", "docs/python.md"])
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model made small. The blocks of a page share their names, as a reader takes them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dim, ways, sources = 16, 4, 3
    names = {
        "blocks": [nn.Linear(dim, dim) for _ in range(3)],
        "dim": dim,
        "x": torch.randn(2, 5, dim),
        "input_ids": torch.randint(64, (2, 5)),
        "targets": torch.randint(64, (2, 5)),
        "hiddens": [torch.randn(2, 5, dim, requires_grad=True) for _ in range(sources)],
        "w1": torch.randn(64, dim),
        "w2": torch.randn(ways * sources, 64),
        "prior": torch.zeros(ways, sources),
        "group": [(ways, sources), (ways, sources + 1)],
    }
    large, small = "n_layer=12, dim=768, n_head=12", "n_layer=3, dim=16, n_head=2, vocab_size=64"
    text = page.read_text()
    assert large in text
    for block in BLOCK.findall(text):
        exec(compile(block.replace(large, small), page.name, "exec"), names)


def public_modules() -> list[str]:
    found = pkgutil.walk_packages(muddformer.__path__, "muddformer.")
    return ["muddformer", *sorted({m.name for m in found if not any(p.startswith("_") for p in m.name.split("."))})]


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, f"{name}.{public}"
