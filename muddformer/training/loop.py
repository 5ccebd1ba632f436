"""The training loop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._files import FileLock, read_json, write_atomically
from ..errors import Diverged, InputError
from ..inference.inspection import inspect_model
from ..inference.loading import find_checkpoints, find_device, load_model
from ..models import MUDDFormer, Pretrained, family_of
from .data import Batches, held_out_batches, prepare_corpus
from .metrics import MetricsFile, Progress, Row, TensorBoard, peak_memory_mib, say
from .modelling import make_config, make_model
from .optim import learning_rate, make_optimizer
from .settings import Settings
from .state import Checkpoint, remove_checkpoints, restore_state, save_checkpoint

__all__ = ["Result", "Trainer", "load_run_settings"]


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        finished: False if it was interrupted by a signal.
        step: updates done.
        val_loss: last held-out loss, nats per token; None if there was no evaluation.
        checkpoint: the newest checkpoint.
    """

    finished: bool
    step: int
    val_loss: float | None
    checkpoint: Path


class Trainer:
    """Trains a model on a corpus, into a folder of its own: ``settings.json``, ``metrics.csv``, ``checkpoints``,
    ``tensorboard``.

    Args:
        settings: of the run.
        run: its folder.
        resume: continue from the newest checkpoint there, or from the start if there is none yet.
        overwrite: remove an earlier run from the folder.

    Raises:
        InputError: if settings, text, device or folder cannot be used, or both flags are set.
    """

    def __init__(self, settings: Settings, run: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if not isinstance(settings, Settings):
            raise InputError(f"settings must be Settings, such as Settings.from_dict() makes, got {type(settings)}")
        if resume and overwrite:
            raise InputError("resume and overwrite exclude each other")
        self.settings = settings
        self.run = run = Path(run)
        self.device = _set_up_torch(settings)
        make_config(settings.model, vocab_size=1)  # a bad value is told before the text is read
        model_class = family_of(settings.model).model
        if settings.train.log_connections and not issubclass(model_class, MUDDFormer):
            raise InputError(
                "train.log_connections must be false: model.model_type names a "
                f"{model_class.__name__}, and only a MUDDFormer can be inspected"
            )
        _check_folder(run, resume, overwrite)
        self._lock = _lock_folder(run)
        try:
            self._set_up(resume, overwrite)
        except BaseException:
            self._lock.release()
            raise

    def _set_up(self, resume: bool, overwrite: bool) -> None:
        settings, run = self.settings, self.run
        try:
            self.corpus = prepare_corpus(settings.data, say)
        except InputError as error:
            moved = [path for path in settings.data.paths if resume and not Path(path).expanduser().exists()]
            hint = ". If the text was moved, give its new place with --set data.paths=PATH" if moved else ""
            raise type(error)(f"{error}{hint}") from error
        _check_folder(run, resume, overwrite)  # it may have changed while there was no lock
        _prepare_folder(run, resume, overwrite)
        checkpoint, restored = _newest_checkpoint(run)
        torch.manual_seed(settings.train.seed)
        if checkpoint is None:
            self.model = make_model(settings.model, self.corpus.vocab_size, settings.train.seed)
        else:
            self._check_same(checkpoint)
            self.model = restored
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, settings.train)
        self.step = self.sequences = 0
        if checkpoint is not None:
            restore_state(checkpoint, self.model, self.optimizer)
            self.step, self.sequences = checkpoint.training["step"], checkpoint.training["sequences"]
        self.checkpoint = checkpoint.folder if checkpoint else None
        self.block_size = self.model.config.block_size
        train = settings.train
        self.batches = Batches(self.corpus.train, self.block_size, train.seed)
        self.held_out = held_out_batches(self.corpus.val, self.block_size, train.batch_size, train.eval_batches)
        self._forward = torch.compile(self.model) if train.compile else self.model
        self._pending: list[tuple[float, Tensor, Tensor]] = []  # learning rate, loss and gradient norm, on the device
        self._stop = False
        text = json.dumps(settings.resolved().to_dict(), indent=1)
        with self._naming_the_checkpoint():
            write_atomically(run / "settings.json", lambda path: path.write_text(text, encoding="utf-8"))
        where = f"from step {self.step}" if checkpoint else "from the start"
        size = sum(parameter.numel() for parameter in self.model.parameters())
        say(f"training {size:,} parameters on {self.device} {where}, {len(self.corpus.train):,} tokens of text")

    def fit(self) -> Result:
        """Trains to the last step. SIGINT and SIGTERM end the run after the update at hand, with a checkpoint.

        Raises:
            Diverged: if a loss or gradient norm is not finite, or no gradient is left. No checkpoint has been written
                since.
            OSError: if a file cannot be written, naming it and the last good checkpoint, which stays whole.
        """
        train, val_loss = self.settings.train, None
        self.model.train()
        if not self._lock.held:  # a second call
            self._lock = _lock_folder(self.run)
        with self._naming_the_checkpoint(), contextlib.ExitStack() as stack:
            stack.callback(self._lock.release)
            stack.enter_context(self._stop_on_signals())
            metrics = MetricsFile(self.run / "metrics.csv", self.step)
            stack.callback(metrics.close)
            board = TensorBoard(self.run / "tensorboard", self.step) if train.tensorboard else None
            if board is not None:
                stack.callback(board.close)
            progress = Progress(train.steps, self.step)
            stack.callback(progress.close)
            clock = time.perf_counter()
            last = self.step >= train.steps
            while not last:
                self.update()
                done = self.step == train.steps
                last = done or self._stop
                evaluate = done or self.step % train.eval_every == 0
                save = last or self.step % train.checkpoint_every == 0
                if not (evaluate or save or self.step % train.log_every == 0):
                    continue
                rows = self._collect(clock)
                try:
                    _check_not_diverged(rows, self.checkpoint)
                    if evaluate:
                        val_loss = rows[-1].val_loss = self.evaluate()
                        _check_not_diverged(rows, self.checkpoint)
                        if board is not None and train.log_connections:
                            board.write_inspection(inspect_model(self.model, [self.held_out[0][0][:1]]), self.step)
                finally:
                    metrics.write(rows)
                    if board is not None:
                        board.write(rows)
                progress.update(rows[-1])
                if save:
                    metrics.sync()  # before the checkpoint, which relies on these rows
                    self.checkpoint = self._save()
                clock = time.perf_counter()
        return Result(self.step >= train.steps, self.step, val_loss, self.checkpoint)

    def update(self) -> None:
        """Updates the parameters once, from the next batches."""
        train = self.settings.train
        self.step += 1
        rate = learning_rate(self.step, train)
        total = torch.zeros((), device=self.device)
        for _ in range(train.accumulation):
            inputs, targets = self.batches(self.sequences, train.batch_size)
            self.sequences += train.batch_size
            loss = self._loss(inputs, targets) / train.accumulation
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.append((rate, total, norm))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy over the held-out batches, nats per token."""
        self.model.eval()
        losses = [self._loss(inputs, targets) for inputs, targets in self.held_out]
        self.model.train()
        return torch.stack(losses).mean().item()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned, so that the copies do not wait for the device
            inputs, targets = (ids.pin_memory().to(self.device, non_blocking=True) for ids in (inputs, targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.train.dtype == "bfloat16"):
            return self._forward(inputs, targets)

    def _collect(self, clock: float) -> list[Row]:
        """The rows of the updates since the last call; waits for the device, once for all of them."""
        values = torch.stack([torch.stack((loss, norm)) for _, loss, norm in self._pending]).tolist()
        tokens_per_step = self.settings.train.batch_size * self.settings.train.accumulation * self.block_size
        speed = tokens_per_step * len(values) / (time.perf_counter() - clock)
        memory = peak_memory_mib(self.device)
        rows = []
        for ago, ((rate, _, _), (loss, norm)) in enumerate(zip(reversed(self._pending), reversed(values), strict=True)):
            tokens = self.sequences * self.block_size - ago * tokens_per_step
            rows.append(Row(self.step - ago, tokens, loss, None, rate, norm, speed, memory))
        self._pending.clear()
        return rows[::-1]

    def _save(self) -> Path:
        training = {
            "step": self.step,
            "sequences": self.sequences,
            "settings": self.settings.to_dict(),
            "corpus": self.corpus.fingerprint,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        tokenizer = self.corpus.tokenizer.to_str()
        return save_checkpoint(self.run, self.model, self.optimizer, tokenizer, training, self.settings.train.keep_last)

    def _check_same(self, checkpoint: Checkpoint) -> None:
        """That the run goes on with the same model and text; says it if the numbers can differ in the last bits."""
        then, now, folder = checkpoint.training, self.settings.to_dict(), str(checkpoint.folder)
        if then["settings"].get("model") != now["model"]:
            before = then["settings"].get("model") or {}
            keys = [key for key in {**before, **now["model"]} if before.get(key) != now["model"].get(key)]
            listed = ", ".join(f"{key} {now['model'].get(key)!r} (there {before.get(key)!r})" for key in keys[:3])
            raise InputError(f"section 'model' is not the one of checkpoint {folder!r}: {listed}")
        if then["corpus"] != self.corpus.fingerprint:
            raise InputError(
                f"the training text is not the one of checkpoint {folder!r}: has data.paths been moved or changed?"
            )
        for section in ("data", "train"):
            before = then["settings"].get(section)
            for name, value in now[section].items():
                if isinstance(before, dict) and before.get(name, value) != value:
                    say(f"{section}.{name}: {value}, before {before[name]}")
        for name, value in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if then[name] != value:
                say(f"{name}: {value}, before {then[name]}; losses can differ in the last bits from those of one run")

    @contextlib.contextmanager
    def _naming_the_checkpoint(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise OSError(f"{where}cannot be written: {error.strerror or error}; {_kept(self.checkpoint)}") from error

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            if self._stop:  # asked for a second time
                raise KeyboardInterrupt
            self._stop = True
            say(f"{signal.Signals(number).name}: ending after this update")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def load_run_settings(run: Path) -> Settings:
    """Settings that a run was started with.

    Raises:
        InputError: if the folder holds no run.
    """
    path = run / "settings.json"
    try:
        return Settings.from_dict(read_json(path))
    except OSError as error:
        raise InputError(f"{str(run)!r} holds no run: {error}") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is broken: {error}") from error


def _set_up_torch(settings: Settings) -> torch.device:
    train = settings.train
    device = find_device(train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def _check_folder(run: Path, resume: bool, overwrite: bool) -> None:
    if (run / "settings.json").exists() and not (resume or overwrite):
        raise InputError(f"{str(run)!r} holds a run already: --resume continues it, --overwrite replaces it")


def _lock_folder(run: Path) -> FileLock:
    """Holds the folder of a run for this process until the run ends, however it ends."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        return FileLock(run / ".lock")
    except BlockingIOError as error:
        raise InputError(f"the run in {str(run)!r} is in use by {error}: wait until it ends, or stop it") from error
    except OSError as error:
        raise InputError(f"cannot use {str(run)!r} as the folder of the run: {error.strerror}") from error


def _newest_checkpoint(run: Path) -> tuple[Checkpoint, Pretrained] | tuple[None, None]:
    """The newest checkpoint of a run and its model, if there is one yet."""
    folders = find_checkpoints(run)
    if not folders:
        return None, None
    try:
        return Checkpoint(folders[-1]), load_model(folders[-1])
    except InputError as error:
        before = f". To go on from {folders[-2].name}, remove {str(folders[-1])!r}" if len(folders) > 1 else ""
        raise InputError(f"{error}{before}") from error


def _prepare_folder(run: Path, resume: bool, overwrite: bool) -> None:
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        if overwrite and not resume:
            remove_checkpoints(run)
            for path in (run / "settings.json", run / "metrics.csv", *run.glob("tensorboard/events.out.tfevents.*")):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {str(run)!r} as the folder of the run: {error.strerror or error}") from error


def _check_not_diverged(rows: list[Row], checkpoint: Path | None) -> None:
    for row in rows:
        numbers = {"loss": row.loss, "gradient norm": row.grad_norm, "held-out loss": row.val_loss}
        bad = [f"{name} {value}" for name, value in numbers.items() if value is not None and not _finite(value)]
        if row.grad_norm == 0 and row.loss > 0:
            bad = [f"loss {row.loss:.4g} and gradient norm 0, as where hidden states beyond 1e19 make a norm return 0"]
        if bad:
            raise Diverged(
                f"step {row.step}: {' and '.join(bad)} (learning rate {row.learning_rate:.3g}); {_kept(checkpoint)}. "
                "A lower train.learning_rate, a longer train.warmup_steps or, in deep models, pre and post norms help"
            )


def _kept(checkpoint: Path | None) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "there was no checkpoint yet"


def _finite(value: float) -> bool:
    return float("-inf") < value < float("inf")
