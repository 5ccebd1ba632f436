"""``muddformer eval``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from muddformer._files import write_atomically
from muddformer.cli.options import add_dtype_option, chosen_dtype, number
from muddformer.cli.progress import Progress
from muddformer.cli.texts import add_text_options, read_texts
from muddformer.errors import InputError
from muddformer.inference.harness import harness_model
from muddformer.inference.loading import load_both, resolve_checkpoint
from muddformer.inference.scoring import TextScore, score_texts
from muddformer.inference.tasks import TaskFigure, run_tasks
