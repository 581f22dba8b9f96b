"""What every way of training has: steps with metrics, evaluations, checkpoints, a resume, and a summary at the end."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm.measurements import Measurements
from efficient_dl.config import Config
from efficient_dl.data import Dataset
from efficient_dl.training import measure, resume
from efficient_dl.training.checkpoint import Checkpoint, CheckpointFolder
from efficient_dl.training.console import Progress
from efficient_dl.training.run_folder import RunFolder, Summary
from efficient_dl.training.signals import Stopped
from efficient_dl.training.task import task_for
from efficient_dl.training.watch import Unwatched, Watch

_MESSAGES = "compression.messages"
_NO_PLAN = ("compression.check_every", "compression.replan")  # what does not decide how gradients are sent


class RunLoop(ABC):
    """One run on one rank. Every rank makes one with the same configuration and calls `train` once.

    What differs between ways of training is abstract below; all of it is called by all ranks in the same order.
    """

    label: str  # what the progress bar says
    compute_seconds: float  # of a step without communication, measured by `_prepare`

    def __init__(self, config: Config, data: Dataset, device: torch.device, progress: Progress) -> None:
        self.config, self.data, self.device, self.progress = config, data, device, progress
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = RunFolder(Path(config.run.out), writes=self.rank == 0)
        self.checkpoints = CheckpointFolder(self.folder.checkpoints, config.train.keep_checkpoints)
        self.task = task_for(data.spec.kind, config.train.objective)
        self.clock = measure.StepClock(device)
        self.step = 0
        self.last_step = config.train.steps
        self.val_loss = float("nan")
        self.saved_step = -1
        self.watch: Watch = Unwatched()
        self.measurements: Measurements | None = None  # what bits = "auto" is planned with
        self.recorded = config  # what the folder shall hold for a resume

    def train(self, resumed: bool) -> Summary:
        """Train from the start, or from the latest checkpoint, to the last step.

        Whatever ends it early, connections to other ranks are broken first, so that none of them waits for this one.
        """
        try:
            return self._train(resumed)
        except BaseException:
            with contextlib.suppress(Exception):  # the error that counts is the one that led here
                self._abort()
            raise

    def _train(self, resumed: bool) -> Summary:
        self._prepare()
        if not (resumed and self._load()):
            self._start()
        elif self.step >= self.last_step:
            return self._already_done()
        self.folder.open(self.recorded, self.step)
        self.progress.start(self.label, self.step, self.config.train.steps)
        with contextlib.closing(self.folder):
            while self.step < self.last_step:
                if not self.watch.may_begin(self.step + 1):
                    self._leave()
                row = self._train_step()
                if self._due(self.config.train.log_every):
                    self._log(row)
                evaluated = self._due(self.config.train.eval_every)
                if evaluated:
                    self._evaluate_watched()
                self.watch.at("between two steps", self.step)
                self._between_steps()
                if self.step == self.last_step and not evaluated:
                    self._evaluate_watched()
                if self._due(self.config.train.checkpoint_every) and self.saved_step != self.step:
                    self._save_watched()
                self.progress.advance(self.step)
            self.watch.at("at the run's end", self.step)
            summary = self._summary()
            self.folder.finish(summary)
        self._close()
        return summary

    def _evaluate_watched(self) -> None:
        self.watch.at("evaluation", self.step)
        self._evaluate()

    def _save_watched(self) -> None:
        self.watch.at("checkpoint", self.step)
        self._save()

    def _leave(self) -> None:
        """All ranks end here, after the same step, by a signal that one of them was sent; raises Stopped."""
        if 0 < self.step != self.saved_step:
            self._save_watched()
        assert self.watch.number is not None
        raise Stopped(self.watch.number, saved=self.step if self.step > 0 else None)

    @abstractmethod
    def _prepare(self) -> None:
        """Make everything ready for the first step, or for a checkpoint."""

    def _start(self) -> None:
        """What a checkpoint would bring along."""
        return

    @abstractmethod
    def _train_step(self) -> dict[str, Tensor | float]:
        """One step, counted in `step`; a row of metrics."""

    @abstractmethod
    def _log(self, row: dict[str, Tensor | float]) -> None:
        """Write a row of metrics, completed by what the ranks know."""

    @abstractmethod
    def _evaluate(self) -> None:
        """Set `val_loss` on validation data, and log it."""

    def _between_steps(self) -> None:
        """What follows a step and its evaluation. May end the run (last_step = step), and save (saved_step = step)."""
        return

    @abstractmethod
    def _save(self) -> None:
        """Write a checkpoint."""

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state."""

    @abstractmethod
    def _traffic(self) -> dict[str, Any]:
        """The summary's fields about bytes and the codec, since the run's start."""

    def _bits(self) -> float | str:
        """What gradients were sent with at last."""
        return self.config.compression.bits

    @abstractmethod
    def _close(self) -> None:
        """Give up what only training needs."""

    @abstractmethod
    def _abort(self) -> None:
        """Break the connections to the other ranks, at any moment, without waiting for anyone."""

    def _read(self, step: int) -> Checkpoint:
        """A checkpoint, with the tensors that `_restore` takes from it."""
        return self.checkpoints.load(step)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint's JSON tells of every kind of run."""
        return {
            "samples_per_step": resume.samples_per_step(self.config, self.world_size),
            "settings": self.config.settings(),
        }

    def _load(self) -> bool:
        """Take over the newest checkpoint, if there is one."""
        step, notes = self.checkpoints.newest_intact()
        for note in notes:
            self.progress.note(note)
        if step is None:
            self.progress.note("There is no checkpoint yet: starting at step 0.")
            return False
        checkpoint = self._read(step)
        for note in resume.check_position(checkpoint, self.config, self.world_size):
            self.progress.note(note)
        self.step = self.saved_step = checkpoint.step
        self._restore(checkpoint)
        return True

    def _same_plan(self, checkpoint: Checkpoint) -> bool:
        """Whether gradients were sent in the same way as now, so that the compression's state goes on; notes if not."""
        before, now = checkpoint.about["settings"], self.config.settings()
        if before.get(_MESSAGES) in (None, "exact") and now[_MESSAGES] == "auto":
            before = {**before, _MESSAGES: "auto"}  # a state brings its own along
        same = all(
            before.get(key) == now[key]
            for key in now
            if key.startswith("compression.") and key not in _NO_PLAN
        )
        if not same:
            self.progress.note("Gradients are sent otherwise than before: bytes are counted from here on.")
        return same

    def _already_done(self) -> Summary:
        """The summary of a run that has reached its last step; made again if it is gone."""
        self._close()
        self.progress.note(f"Step {self.step} of {self.last_step} was reached before: nothing to train.")
        summary = self.folder.summary()
        if summary is None:
            self._evaluate()
            median = self.folder.step_seconds_median()
            summary = dataclasses.replace(self._summary(), step_seconds_median=median)
            self.folder.finish(summary)
        return summary

    def _summary(self) -> Summary:
        config = self.config
        per_sample = self.data.spec.shape[0] if self.task.unit == "tokens" else 1
        return Summary(
            val_loss=self.val_loss,
            steps=self.step,
            tokens_or_samples=self.step * resume.samples_per_step(config, self.world_size) * per_sample,
            step_seconds_median=self._mean_over_ranks(self.clock.median()),
            compute_seconds_median=self._mean_over_ranks(self.compute_seconds),
            peak_memory_bytes=max(self._over_ranks(measure.peak_memory_bytes(self.device))),
            bits=self._bits(),
            seed=config.train.seed,
            world_size=self.world_size,
            **self._traffic(),
        )

    def _over_ranks(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def _mean_over_ranks(self, value: float) -> float:
        return sum(self._over_ranks(value)) / self.world_size

    def _due(self, every: int) -> bool:
        return self.step == self.last_step or (every > 0 and self.step % every == 0)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"
