"""Training: data, loop, checkpoints, metrics and the demo. The command line is built on it."""

from ..errors import Diverged, InputError, MissingPackage
from .data import Batches, Corpus, prepare_corpus
from .loop import Result, Trainer
from .settings import DataSettings, Settings, TrainSettings, load_file, load_preset

__all__ = [
    "Batches",
    "Corpus",
    "DataSettings",
    "Diverged",
    "InputError",
    "MissingPackage",
    "Result",
    "Settings",
    "TrainSettings",
    "Trainer",
    "load_file",
    "load_preset",
    "prepare_corpus",
]
