"""Sets of runs, each described by a YAML file in runs/: a base, forms of the model, and the grid that they are run on.

A run is what it computes: runs of two sets that compute the same are one, with one ``id``, and are trained once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from parts import digest

from muddformer.errors import InputError
from muddformer.training import Settings, TrainSettings

__all__ = ["KINDS", "Run", "RunSet", "load_set"]

KINDS = ("time", "sweep", "ablation", "stability")
_KEYS = {
    "title", "kind", "note", "baseline", "model", "train", "warmup", "evaluations", "tokens", "seeds", "learning_rates",
    "forms", "goals", "order", "beside",
}  # fmt: skip
_GOALS = {"loss", "compute", "seconds", "tokens"}
_FORM_KEYS = {"label", "model", "train"}
_COMPUTED = {"steps", "warmup_steps", "seed", "learning_rate"}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        form: name of the model's form in its set.
        model: fields of ``MUDDFormerConfig`` but the vocabulary.
        train: fields of ``TrainSettings`` but those that the others give.
        tokens: the budget; each token is seen once.
        learning_rate: peak.
        warmup: share of the steps.
        seed: of the parameters and the order of the data.
        evaluations: rows that the run gives, at equal distances; the last is at the end.
    """

    form: str
    model: dict[str, Any]
    train: dict[str, Any]
    tokens: int
    learning_rate: float
    warmup: float
    seed: int
    evaluations: int

    @property
    def id(self) -> str:
        """Hash of all that its losses depend on, but the corpus and the code."""
        fields = dataclasses.asdict(self)
        del fields["form"], fields["evaluations"]
        return digest(json.dumps(fields, sort_keys=True).encode())[:12]

    @property
    def size(self) -> str:
        """Layers x width."""
        return f"{self.model['n_layer']}x{self.model['dim']}"

    @property
    def name(self) -> str:
        """What it is, for people and for --only."""
        return f"{self.size}/{self.form}/{self.tokens / 1e6:.0f}M/lr{self.learning_rate:g}/seed{self.seed}"

    @property
    def settings(self) -> TrainSettings:
        """The same as training settings."""
        train = Settings.from_dict({"train": self.train}).train
        per_step = train.batch_size * train.accumulation * self.model["block_size"]
        if self.tokens % per_step:
            raise InputError(f"tokens must be a multiple of the {per_step:,} of a step, got {self.tokens:,}")
        steps = self.tokens // per_step
        computed = {"steps": steps, "warmup_steps": round(self.warmup * steps), "seed": self.seed}
        return dataclasses.replace(train, learning_rate=self.learning_rate, **computed)


@dataclass(frozen=True)
class RunSet:
    """The runs of a file.

    Attributes:
        title, note: what report.py writes over and under its tables.
        kind: which tables these are, one of :data:`KINDS`.
        baseline: the form that others are compared with.
        goals: figures to reach: nats below the baseline ("loss"), after so many "tokens" at least; advantages in
            "compute" and in "seconds".
        order: forms, each of which adds something to the one before.
        beside: forms that others are compared with besides the baseline.
        labels: of the forms, as they are listed.
        runs: all of them.
    """

    title: str
    note: str
    kind: str
    baseline: str
    goals: dict[str, float]
    order: list[str]
    beside: list[str]
    labels: dict[str, str]
    runs: list[Run]


def load_set(path: Path) -> RunSet:
    """Reads a set of runs.

    Raises:
        InputError: naming the file and what is wrong in it.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _parse(values)
    except (OSError, yaml.YAMLError, InputError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{str(path)!r} describes no set of runs: {error!r}") from error


def _parse(values: dict[str, Any]) -> RunSet:
    _check_keys("the set", values, _KEYS)
    if values["kind"] not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {values['kind']!r}")
    goals = values.get("goals", {})
    _check_keys("goals", goals, _GOALS)
    forms = {form: given or {} for form, given in values["forms"].items()}
    runs = []
    for form, given in forms.items():
        _check_keys(f"form {form!r}", given, _FORM_KEYS)
        train = {**values.get("train", {}), **given.get("train", {})}
        rates = values.get("learning_rates") or [train.pop("learning_rate", None)]
        if computed := _COMPUTED & train.keys():
            told = "tokens, warmup, seeds and learning_rates do"
            raise InputError(f"train must not give {', '.join(sorted(computed))}: {told}")
        if None in rates:
            raise InputError("there is neither train.learning_rate nor learning_rates")
        model = {**values["model"], **given.get("model", {})}
        for tokens, rate, seed in itertools.product(values["tokens"], rates, values["seeds"]):
            warmup, evaluations = values.get("warmup", 0.1), values.get("evaluations", 10)
            run = Run(form, model, train, tokens, rate, warmup, seed, evaluations)
            run.settings  # noqa: B018, checks them
            runs.append(run)
    baseline = values.get("baseline", next(iter(forms)))
    labels = {form: given.get("label", form) for form, given in forms.items()}
    order, beside = (values.get(key, []) for key in ("order", "beside"))
    _check_keys("order", dict.fromkeys(order), forms)
    _check_keys("beside", dict.fromkeys(beside), forms)
    kind = values["kind"]
    if (order or beside) and kind != "ablation":
        raise InputError(f"order and beside must be of an ablation, but kind is {kind!r}")
    if kind in ("time", "ablation") and "learning_rates" in values:
        raise InputError(f"learning_rates must be of a sweep or of stability, but kind is {kind!r}")
    if kind == "sweep" and len(values["tokens"]) > 1:
        raise InputError(f"tokens of a sweep must be one budget, got {values['tokens']}")
    return RunSet(values["title"], values.get("note", ""), kind, baseline, goals, order, beside, labels, runs)


def _check_keys(owner: str, values: dict[str, Any], known: Collection[str]) -> None:
    if unknown := [key for key in values if key not in known]:
        raise InputError(
            f"{owner} has unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
        )
