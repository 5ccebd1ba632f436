"""One run at a time on one device: training, rows, checkpoints."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import float8_history  # noqa: F401  (registers its model type)
import torch
from parts import Parts
from rows import Row, append_row
from sets import Run
from torch import Tensor, nn

from muddformer.inference.loading import find_checkpoints, load_model
from muddformer.models import Pretrained, build_model
from muddformer.training import Batches
from muddformer.training.data import held_out_batches
from muddformer.training.modelling import make_config
from muddformer.training.optim import learning_rate, make_optimizer
from muddformer.training.state import Checkpoint, checkpoint_name, restore_state, save_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import commit, device_name
from training import step_flops

__all__ = ["Trainer"]


class Trainer:
    """Trains runs one after another on a device. Runs of the same model in a row are compiled once.

    Args:
        parts: the corpus.
        longest: tokens of the longest run to come.
        out: folder of the checkpoints, one folder in it for each run.
        rows: file that rows are appended to.
        device: to train on.
        deadline: in seconds of time.time(); None: none.
        checkpoint_every: seconds between checkpoints.
        keep: keep a checkpoint of every evaluation, also when the run has finished.
        revision: of the code, for the rows; None: what git says.
    """

    def __init__(
        self,
        parts: Parts,
        longest: int,
        out: Path,
        rows: Path,
        device: torch.device,
        deadline: float | None = None,
        checkpoint_every: float = 60.0,
        keep: bool = False,
        revision: str | None = None,
    ) -> None:
        self.parts, self.out, self.rows, self.device = parts, out, rows, device
        self.deadline, self.checkpoint_every, self.keep = deadline, checkpoint_every, keep
        self.revision = commit() if revision is None else revision
        self.held_out = parts.held_out()
        self.train_ids = parts.train(longest)
        self._compiled: tuple[dict, Pretrained, Callable] | None = None
        self.device_name = device_name(device)

    def __call__(self, run: Run) -> str:
        """Trains a run to its end, from its checkpoint if there is one.

        Returns:
            "finished", "diverged", or "cut" if the deadline came first.
        """
        model, forward = self._model(run)
        progress = _Progress(run, self, model, forward)
        state = progress.train()
        if state != "cut" and not self.keep:
            shutil.rmtree(self.out / run.id, ignore_errors=True)
        return state

    def _model(self, run: Run) -> tuple[Pretrained, Callable]:
        """The run's model with fresh parameters, and what to call in its place."""
        settings = run.settings
        built_from = {**run.model, "compile": settings.compile}
        if self._compiled is None or self._compiled[0] != built_from:
            self._compiled = None
            torch._dynamo.reset()
            gc.collect()  # the last model is in cycles, and may be most of the device's memory
            model = build_model(make_config(run.model, self.parts.vocab_size), device=self.device)
            self._compiled = built_from, model, torch.compile(model) if settings.compile else model
        _, model, forward = self._compiled
        torch.manual_seed(run.seed)
        model.reset_parameters()
        return model, forward


class _Progress:
    """A run from its checkpoint, or its start, on."""

    def __init__(self, run: Run, trainer: Trainer, model: Pretrained, forward: Callable) -> None:
        self.run, self.trainer, self.model, self.forward = run, trainer, model, forward
        self.settings = settings = run.settings
        self.folder = trainer.out / run.id
        self.optimizer = make_optimizer(model, settings)
        self.step, self.seconds, self.device = 0, 0.0, trainer.device_name
        self.losses: list[float | Tensor] = []  # of the steps since the last row
        self.norms: list[float | Tensor] = []
        block = run.model["block_size"]
        # Batches leaves out a window, so that an epoch can begin anywhere in the first: with one more, all are used.
        self.batches = Batches(trainer.train_ids[: run.tokens + block + 1], block, run.seed)
        self.held_out = held_out_batches(trainer.held_out, block, settings.batch_size, settings.eval_batches)
        every = max(1, settings.steps // run.evaluations)
        self.evaluations = {settings.steps - n * every for n in range(run.evaluations)}
        if checkpoints := find_checkpoints(self.folder):
            self._restore(checkpoints[-1])

    def train(self) -> str:
        trainer = self.trainer
        if self.settings.compile:
            self._warm_up()
        self.model.train()
        self._synchronize()
        saved, clock, state = time.time(), time.perf_counter(), ""
        while not state:
            self._update()
            evaluate = self.step in self.evaluations
            late = trainer.deadline is not None and time.time() >= trainer.deadline
            save = late or time.time() - saved >= trainer.checkpoint_every
            if not (evaluate or save):
                continue
            self._synchronize()
            self.seconds += time.perf_counter() - clock
            self.losses, self.norms = _numbers(self.losses), _numbers(self.norms)
            if evaluate:
                state = self._evaluate()
            if not state and (save or (evaluate and trainer.keep)):
                self._save()
                saved, state = time.time(), "cut" if late else ""
            clock = time.perf_counter()
        if state != "cut" and trainer.keep:
            self._save()
        self.optimizer.zero_grad(set_to_none=True)
        return state

    def _update(self) -> None:
        settings = self.settings
        per_step = settings.batch_size * settings.accumulation
        total = torch.zeros((), device=self.trainer.device)
        for n in range(settings.accumulation):
            batch = self.batches(self.step * per_step + n * settings.batch_size, settings.batch_size)
            loss = self._loss(self.forward, *batch) / settings.accumulation
            loss.backward()
            total += loss.detach()
        self.step += 1
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.norms.append(norm)

    def _loss(self, forward: Callable, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self.trainer.device
        if device.type == "cuda":  # pinned, so that the copies do not wait for the device
            inputs, targets = (ids.pin_memory().to(device, non_blocking=True) for ids in (inputs, targets))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            return forward(inputs, targets)

    def _warm_up(self) -> None:
        """Compiles, before the clock runs: a step without its update."""
        self.model.train()
        self._loss(self.forward, *self.batches(0, self.settings.batch_size)).backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _evaluate(self) -> str:
        """Appends a row, and says whether the run ends with it."""
        self.model.eval()  # and not compiled: compiling once more takes longer than all evaluations
        held_out = torch.stack([self._loss(self.model, *batch) for batch in self.held_out]).mean().item()
        self.model.train()
        finite = all(map(math.isfinite, (*self.losses, *self.norms, held_out)))
        run, settings, block = self.run, self.settings, self.run.model["block_size"]
        shape = SimpleNamespace(tokens=1, width=run.model["dim"], layers=run.model["n_layer"], length=block)
        row = Row(
            run=run.id,
            size=run.size,
            form=run.form,
            learning_rate=run.learning_rate,
            budget=run.tokens,
            seed=run.seed,
            step=self.step,
            tokens=self.step * settings.batch_size * settings.accumulation * block,
            seconds=round(self.seconds, 3),
            loss=statistics.fmean(self.losses),
            loss_max=max(self.losses),
            held_out_loss=held_out,
            grad_norm=statistics.fmean(self.norms),
            grad_norm_max=max(self.norms),
            state="",
            parameters=sum(p.numel() for p in self.model.parameters()),
            flops_per_token=step_flops(self.model, shape),
            corpus=self.trainer.parts.id,
            device=self.device,
            torch=torch.__version__,
            commit=self.trainer.revision,
            date=datetime.date.today().isoformat(),
        )
        if not finite or row.dead:
            row = dataclasses.replace(row, state="diverged")
        elif self.step == settings.steps:
            row = dataclasses.replace(row, state="finished")
        append_row(self.trainer.rows, row)
        self.losses, self.norms = [], []
        print(
            f"{run.name}  step {self.step}/{settings.steps}  held-out loss {held_out:.4f}  "
            f"{row.tokens / self.seconds:,.0f} tokens/s  {row.state}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
        return row.state

    def _save(self) -> None:
        training = {
            "step": self.step,
            "sequences": self.step * self.settings.batch_size * self.settings.accumulation,
            "settings": dataclasses.asdict(self.run),
            "corpus": {"id": self.trainer.parts.id},
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": self.seconds,
            "device": self.device,
            "losses": self.losses,
            "norms": self.norms,
        }
        older = find_checkpoints(self.folder)
        kept = len(older) + 1 if self.trainer.keep else 1
        save_checkpoint(self.folder, self.model, self.optimizer, self.trainer.parts.tokenizer_json, training, kept)
        if self.trainer.keep:
            evaluated = {checkpoint_name(step) for step in self.evaluations}
            for path in (path for path in older if path.name not in evaluated):
                shutil.rmtree(path)

    def _restore(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        self.model.load_state_dict(load_model(folder).state_dict())
        restore_state(checkpoint, self.model, self.optimizer)
        self.step, self.seconds = checkpoint.training["step"], checkpoint.training["seconds"]
        if checkpoint.training["device"] != self.device:  # seconds of both: not to be compared with either's
            self.device = f"{checkpoint.training['device']} and {self.device}"
        self.losses, self.norms = checkpoint.training["losses"], checkpoint.training["norms"]

    def _synchronize(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()


def _numbers(values: list[float | Tensor]) -> list[float]:
    """Waits for the device once for all of them."""
    known = [value for value in values if not isinstance(value, Tensor)]
    new = values[len(known) :]
    return known + (torch.stack(new).tolist() if new else [])
