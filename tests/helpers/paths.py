"""Where the tests, the repository and the package are."""

import os
from pathlib import Path

import muddformer

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
# For PYTHONPATH of a process in any folder: the source folder alone has no compiled part.
PACKAGE = os.pathsep.join(str(Path(folder).resolve().parent) for folder in muddformer.__path__)
