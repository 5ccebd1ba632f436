"""Settings of a training run: sections ``model``, ``data`` and ``train`` of a YAML or TOML file, presets and overrides.

The sections ``data`` and ``train`` are the dataclasses below; each field carries its help, unit and bounds, from
which the command line's help is made. The section ``model`` holds fields of ``muddformer.MUDDFormerConfig``, which
checks them itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import InputError, MissingPackage, require

__all__ = ["DataSettings", "Settings", "TrainSettings", "load_file", "load_preset", "preset_names", "suggest"]

PRESETS = Path(__file__).resolve().parent / "presets"


def _option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its help text and any of ``least``, ``above``, ``most``, ``below`` and ``choices``."""
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class _Section:
    """A section whose values are checked when it is made; InputError names the bad one."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = _check(f"{self.section}.{f.name}", getattr(self, f.name), hints[f.name], f.metadata)
            object.__setattr__(self, f.name, value)


@dataclass(frozen=True)
class DataSettings(_Section):
    """What to train on (section ``data``)."""

    section: ClassVar[str] = "data"
    paths: tuple[str, ...] = _option((), "text files or folders; none: the source of Python's standard library")
    text_field: str = _option("text", "the field of .jsonl and .parquet files that has the texts")
    pattern: str = _option("*", "which files of a folder are taken, a shell pattern for the file name")
    vocab_size: int = _option(4096, "most tokens of the byte-level BPE vocabulary", least=257, most=2**24)
    val_fraction: float = _option(0.05, "share of the files that is held out", above=0, below=1)
    cache_dir: str | None = _option(None, "folder of the token files; none: muddformer in the user's cache folder")


@dataclass(frozen=True)
class TrainSettings(_Section):
    """How to train (section ``train``). One step is one update of the parameters."""

    section: ClassVar[str] = "train"
    steps: int = _option(1000, "number of updates", least=1)
    batch_size: int = _option(16, "sequences of model.block_size tokens per forward and backward pass", least=1)
    accumulation: int = _option(1, "passes per update", least=1)
    learning_rate: float = _option(1e-3, "peak of the schedule", above=0)
    min_lr_ratio: float = _option(0.1, "share of the peak that the cosine ends at", least=0, most=1)
    warmup_steps: int = _option(100, "updates of linear warm-up", least=0)
    weight_decay: float = _option(0.1, "decay of matrices; embeddings, norms, biases, connections have none", least=0)
    beta1: float = _option(0.9, "first moment of AdamW", least=0, below=1)
    beta2: float = _option(0.95, "second moment of AdamW", least=0, below=1)
    grad_clip: float = _option(1.0, "largest gradient norm", above=0)
    dtype: str = _option("float32", "bfloat16 runs under autocast", choices=("float32", "bfloat16"))
    compile: bool = _option(False, "run the model through torch.compile")
    deterministic: bool = _option(False, "deterministic algorithms on CUDA too, slower (the CPU needs no switch)")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = _option(None, "CPU threads; none: as many as torch takes", least=1)
    seed: int = _option(0, "seed of the parameters and of the order of the data", least=0, most=2**63 - 1)
    log_every: int = _option(10, "updates between two lines of progress", least=1)
    eval_every: int = _option(100, "updates between two evaluations", least=1)
    eval_batches: int = _option(16, "batches of held-out text per evaluation, always the same", least=1)
    checkpoint_every: int = _option(500, "updates between two checkpoints", least=1)
    keep_last: int = _option(2, "checkpoints kept", least=1)
    tensorboard: bool = _option(True, "write the metrics for TensorBoard too")
    log_connections: bool = _option(False, "show TensorBoard what the connections do, at every evaluation")


@dataclass(frozen=True)
class Settings:
    """All settings of a run. ``model`` maps fields of ``MUDDFormerConfig`` to values."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> Settings:
        """Settings from nested mappings, with types and bounds checked.

        Raises:
            InputError: naming the unknown or bad key.
        """
        _check_sections(sections)
        model = dict(sections.get("model") or {})
        for key in model:
            if not isinstance(key, str):
                raise InputError(f"section 'model': keys must be text, got {key!r}")
        return cls(
            model=model,
            data=_read_section(DataSettings, sections.get("data") or {}),
            train=_read_section(TrainSettings, sections.get("train") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain data, which :meth:`from_dict` reads."""
        return {
            "model": dict(self.model),
            "data": {**dataclasses.asdict(self.data), "paths": list(self.data.paths)},
            "train": dataclasses.asdict(self.train),
        }

    def resolved(self) -> Settings:
        """These settings with absolute paths, which do not depend on where a run is resumed."""
        paths = tuple(str(Path(path).absolute()) for path in self.data.paths)
        return dataclasses.replace(self, data=dataclasses.replace(self.data, paths=paths))

    def override(self, assignments: Sequence[str]) -> Settings:
        """These settings with ``section.key=value`` assignments applied; values are written as in YAML.

        Raises:
            InputError: naming the assignment.
        """
        if isinstance(assignments, str):
            raise InputError(f"settings must be a list of SECTION.KEY=VALUE, got one text {assignments!r}")
        sections = self.to_dict()
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            section, dot, key = name.strip().partition(".")
            if not (equals and dot and key) or section not in sections:
                raise InputError(
                    f"bad setting {assignment!r}: expected SECTION.KEY=VALUE, section model, data or train"
                )
            try:
                sections[section][key] = _load_yaml(text, assignment)
            except MissingPackage:
                raise
            except InputError:  # such as *.txt: a text as it stands
                sections[section][key] = text
        return Settings.from_dict(sections)

    def merge(self, sections: Mapping[str, Mapping[str, Any] | None]) -> Settings:
        """These settings with the keys of nested mappings put over them, checked as in :meth:`from_dict`."""
        _check_sections(sections)
        merged = {name: {**section, **(sections.get(name) or {})} for name, section in self.to_dict().items()}
        return Settings.from_dict(merged)


def _check_sections(sections: Any) -> None:
    """Refuses anything but a mapping of known sections to mappings or None."""
    if not isinstance(sections, Mapping):
        raise InputError(f"settings must be a mapping of sections, got {_kind(sections)}")
    known = [f.name for f in dataclasses.fields(Settings)]
    for name, section in sections.items():
        if name not in known:
            raise InputError(f"unknown section {name!r}{suggest(name, known)}")
        if section is not None and not isinstance(section, Mapping):
            raise InputError(f"section {name!r} must map keys to values, got {_kind(section)}")


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> Settings:
    """Settings of a preset.

    Raises:
        InputError: if there is no preset of this name.
    """
    if name not in preset_names():
        raise InputError(f"unknown preset {name!r}; there are {', '.join(preset_names())}")
    return load_file(PRESETS / f"{name}.yaml")


def load_file(path: str | Path, over: Settings | None = None) -> Settings:
    """Settings from a ``.yaml``, ``.yml`` or ``.toml`` file.

    Args:
        path: the file.
        over: what keys that the file leaves out are; None: the defaults.

    Raises:
        InputError: if the file cannot be read or parsed or holds a bad value, naming the file.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise InputError(f"config file {str(path)!r} must end in .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read config file {str(path)!r}: {_one_line(error)}") from error
    load = _load_toml if path.suffix == ".toml" else _load_yaml
    sections = load(text, f"config file {str(path)!r}")
    try:
        settings = Settings.from_dict({} if sections is None else sections)
        return settings if over is None else over.merge(sections or {})
    except InputError as error:
        raise InputError(f"config file {str(path)!r}: {error}") from error


def _load_yaml(text: str, source: str) -> Any:
    yaml = require("yaml")

    class Loader(yaml.SafeLoader):
        """YAML 1.1 reads 1e-3 as text; YAML 1.2, and people, read it as a number."""

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid YAML: {_one_line(error)}") from error


def _load_toml(text: str, source: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError as error:
            raise InputError(f"{source}: TOML needs Python 3.11 or the package tomli; use YAML instead") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{source} is not valid TOML: {_one_line(error)}") from error


def _read_section(cls: type[_Section], values: Mapping[str, Any]) -> Any:
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in fields:
            known = [f"{cls.section}.{name}" for name in fields]
            raise InputError(f"unknown key '{cls.section}.{key}'{suggest(f'{cls.section}.{key}', known)}")
    return cls(**values)


def _check(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> Any:
    """The value in its field's type, or an InputError that says what was expected."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None or value == "none":
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise InputError(f"{name} must be a list of texts, got {value!r}")
        return tuple(items)
    if hint in (int, float) and isinstance(value, numbers.Real) and not isinstance(value, bool | float):
        try:  # 1 for a number, and integers of numpy
            value = int(value) if isinstance(value, numbers.Integral) and hint is int else float(value)
        except OverflowError:
            raise InputError(f"{name} must be finite, got a number of hundreds of digits") from None
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3
        value = int(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
        raise InputError(f"{name} must be {names[hint]}{' or none' if optional else ''}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{name} must be finite, got {value!r}")
    rules = {
        "least": (lambda bound: value >= bound, "at least"),
        "above": (lambda bound: value > bound, "greater than"),
        "most": (lambda bound: value <= bound, "at most"),
        "below": (lambda bound: value < bound, "less than"),
        "choices": (lambda bound: value in bound, "one of"),
    }
    for rule, (holds, words) in rules.items():
        if rule in bounds and not holds(bounds[rule]):
            bound = ", ".join(bounds[rule]) if rule == "choices" else bounds[rule]
            raise InputError(f"{name} must be {words} {bound}, got {value!r}")
    return value


def suggest(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is most like it, or nothing."""
    known, (section, dot, key) = list(known), str(name).rpartition(".")
    words = {other: other.removeprefix(section + dot).split("_") for other in known}
    close = [other for other in known if len(key) > 1 and "".join(word[0] for word in words[other]) == key]  # lr
    close = close or difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _kind(value: Any) -> str:
    return type(value).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
