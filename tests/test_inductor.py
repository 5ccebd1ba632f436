"""torch.compile's backend knows the operators before it meets them."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, torch, muddformer
assert "torch._inductor.lowering" not in sys.modules
from torch._inductor import lowering
assert torch.ops.muddformer.linear_forward.default in lowering.lowerings
assert torch.ops.muddformer.deferred_flush.default in lowering.lowerings
"""


def test_operators_are_called_as_they_are() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
