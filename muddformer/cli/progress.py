"""Progress of a command whose end is known."""

from __future__ import annotations

import sys

from muddformer.errors import require

__all__ = ["Progress"]


class Progress:
    """Progress on stderr: a bar of ``rich`` on a terminal, else a line at every tenth of the way.

    Args:
        task: what is done, in a word or two.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._told = 0
        self._bar = None
        if sys.stderr.isatty():
            rich = require("rich.progress")
            columns = ("{task.description}", rich.BarColumn(), rich.TaskProgressColumn(), rich.TimeRemainingColumn())
            self._bar = rich.Progress(*columns, console=require("rich.console").Console(stderr=True))
            self._bar.add_task(task, total=None)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """So much is done of the whole."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif (tenths := 10 * done // max(total, 1)) > self._told:
            self._told = tenths
            print(f"{self._task} {10 * tenths} %", file=sys.stderr, flush=True)
