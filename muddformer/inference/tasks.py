"""Tasks of lm-evaluation-harness (``pip install "muddformer[eval]"``), run on our inference."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError, require

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

__all__ = ["TaskFigure", "run_tasks"]


class TaskFigure(NamedTuple):
    """A metric of a task, or of a group of tasks.

    Attributes:
        task: its name.
        version: of its definition.
        shots: examples before each question.
        samples: number of questions.
        metric, filter: what was measured, of which part of an answer.
        value, stderr: the mean and its standard error; None: the harness has none.
    """

    task: str
    version: str
    shots: int | None
    samples: int | None
    metric: str
    filter: str
    value: float
    stderr: float | None


def run_tasks(
    model: TemplateLM,
    tasks: Sequence[str],
    *,
    folders: Sequence[Path] = (),
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[TaskFigure]:
    """Figures of lm-evaluation-harness's tasks.

    Args:
        model: of :func:`harness_model`.
        tasks: names of tasks, groups and tags, or ``.yaml`` files that define one.
        folders: with more ``.yaml`` files, whose tasks may be named.
        shots: examples before each question. None: as the task has it.
        limit: questions of each task. None: all.
        seed: of the choice of examples.

    Raises:
        InputError: for an unknown task, or one whose data cannot be loaded.
        MissingPackage: without the package ``lm_eval``.
    """
    files = {name: Path(name).resolve() for name in tasks if name.endswith((".yaml", ".yml"))}
    names = [_task_of(files[name]) if name in files else name for name in tasks]
    own = sorted({*(path.parent for path in files.values()), *(folder.resolve() for folder in folders)})
    manager_of = require("lm_eval.tasks", "eval").TaskManager
    for defaults in (False, True):  # to read the harness's own thousands takes long
        manager = manager_of(include_path=[str(folder) for folder in own], include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            break
    else:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"lm-evaluation-harness has no task {unknown[0]!r}{hint}")
    try:
        results = require("lm_eval", "eval").simple_evaluate(
            model=model,
            tasks=names,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except InputError:
        raise
    except (OSError, ValueError) as error:  # what loading data fails with
        raise InputError(f"the tasks {', '.join(names)} cannot be run: {' '.join(str(error).split())[:300]}") from error
    return [figure for name in results["results"] for figure in _figures(results, name)]


def _task_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the task {str(path)!r}: {error}") from error
    for key in ("group", "task"):  # by hand: a task's YAML has tags of the harness
        if found := re.search(rf"^{key}:[ \t]*['\"]?([^\s'\"#]+)", text, re.MULTILINE):
            return found[1]
    raise InputError(f"{str(path)!r} defines no task: it has no line 'task: NAME'")


def _figures(results: Mapping[str, Any], task: str) -> Iterator[TaskFigure]:
    values = results["results"][task]
    samples = results.get("n-samples", {}).get(task, {}).get("effective")
    for key, value in values.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{name}")
        yield TaskFigure(
            task=task,
            version=str(results.get("versions", {}).get(task, "")),
            shots=results.get("n-shot", {}).get(task),
            samples=samples,
            metric=metric,
            filter=name,
            value=float(value),
            stderr=float(error) if isinstance(error, int | float) else None,
        )
