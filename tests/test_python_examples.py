"""The programs of examples/python: short, and each runs by itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.paths import PACKAGE, ROOT

EXAMPLES = ROOT / "examples" / "python"
ENVIRONMENT = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples(example, tmp_path):
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and len(example.read_text().splitlines()) < 60
