"""``python -m muddformer``."""

import sys

from muddformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
