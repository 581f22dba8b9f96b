"""What benchmarks.partitionwise runs on emulated hosts: its cases and systems, and one rank's share of the work.

Both ways of training are those of `edl train`; what is added here only watches their steps.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.nic import sent_bytes
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import Dataset, load_data
from efficient_dl.training import Worker, launch, measure
from efficient_dl.training.console import progress_for
from efficient_dl.training.end_to_end import Trainer
from efficient_dl.training.local_loop import LocalTrainer
from efficient_dl.training.run_folder import RunFolder
from efficient_dl.training.run_loop import RunLoop

NATIVE, TWO_BITS = "data-parallel, native", "data-parallel, 2 bits"
ALONE = "backprop on one host"
SYSTEMS = {
    ALONE: ("local.mode=end-to-end", "compression.bits=none"),
    NATIVE: ("local.mode=end-to-end", "compression.bits=none"),
    TWO_BITS: ("local.mode=end-to-end", "compression.bits=2.0"),
    "partition-wise, exact": ("local.mode=partitionwise", "compression.bits=2.0"),
    "partition-wise, 4 bits": (
        "local.mode=partitionwise",
        "compression.bits=2.0",
        "local.activations=4.0",
    ),
}
DATA_PARALLEL = (NATIVE, TWO_BITS)
IN_LESS_MEMORY = {  # of which only the memory is measured
    f"{name}, checkpointing": (*settings, "train.activation_checkpointing=true")
    for name, settings in SYSTEMS.items()
    if name != ALONE
}

CURVE_OF = {ALONE: NATIVE}
"""Whose losses a system's are but for rounding: it takes the same samples for the same steps."""

RATE_OF = {ALONE: NATIVE, TWO_BITS: NATIVE, "partition-wise, 4 bits": "partition-wise, exact"}
"""Whose learning rate a system takes that computes nearly the same."""


LENGTH = 3
"""A whole run, in those after which native's loss is what all are to reach: larger steps, few bits and local losses may
need more samples to get there."""


@dataclass(frozen=True)
class Case:
    """What all systems have in common, for one size of a step.

    batch: samples of a step, over all ranks. samples: after which native's loss is the target. every: samples between
    evaluations, held_out: of an evaluation. tuned: whether each system has a learning rate of its own.
    Learning rates are constant after their warm-up, so that a curve does not depend on where it was to end.
    """

    settings: tuple[str, ...]
    batch: int
    samples: int
    every: int
    held_out: int
    tuned: bool = True

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return LENGTH * self.samples // self.batch

    def title(self, ranks: int) -> str:
        config = with_overrides(Config(), self.settings)
        model, context = config.model, f" x {config.model.context}" if config.model.name == "gpt" else ""
        return (
            f"{model.name}-{model.size} on {config.data.name}, {self.batch}{context} a step, {self.held_out} held out, "
            f"{config.optimizer.name} tuned, heads {config.local.heads}, {ranks} ranks"
        )

    def overrides(self, system: str, ranks: int, seed: int, steps: int, rate: float, *more: str) -> list[str]:
        """The settings of one run: a partition for each rank, and one stage, as nothing moves."""
        ranks = ranks_of(system, ranks)
        return [
            *self.settings,
            *(SYSTEMS | IN_LESS_MEMORY)[system],
            f"optimizer.lr={rate}",
            f"data.batch_size={self.batch // ranks}",
            f"local.partitions={ranks}",
            "local.balance=parameters",
            f"local.stage_steps={steps}",
            "optimizer.schedule=constant",
            f"train.seed={seed}",
            f"train.steps={steps}",
            f"train.log_every={steps}",
            "train.checkpoint_every=0",
            f"run.workers={ranks}",
            "run.threads=1",
            "run.timeout_seconds=300",
            *more,
        ]

    def evaluations(self, ranks: int) -> list[str]:
        """The settings by which a whole run draws its curve."""
        return [
            f"train.eval_every={self.every // self.batch}",
            f"train.eval_batches={max(1, self.held_out * ranks // self.batch)}",
        ]

    @property
    def rate(self) -> float:
        """The learning rate from which on one is looked for."""
        return with_overrides(Config(), self.settings).optimizer.lr


def ranks_of(system: str, ranks: int) -> int:
    """How many ranks a system has, of those of the study."""
    return 1 if system == ALONE else ranks


def sizes(case: Case, *batches: int) -> tuple[Case, ...]:
    """The same case with steps of several sizes."""
    return tuple(replace(case, batch=batch) for batch in batches)


def _gpt(heads: str) -> tuple[Case, ...]:
    return sizes(
        Case(
            (
                "model.name=gpt",
                "model.size=mini",
                "model.tie_weights=false",
                "data.name=stdlib",
                "optimizer.lr=0.003",
                f"local.heads={heads}",
            ),
            batch=8,
            samples=640,
            every=64,
            held_out=64,
        ),
        8,
        32,
    )


CASES = {
    "mlp": sizes(
        Case(
            ("model.name=mlp", "model.size=base", "data.name=fashion-mnist", "local.heads=linear"),
            batch=128,
            samples=49_152,
            every=2_048,
            held_out=2_048,
        ),
        128,
        512,
        2_048,
    ),
    "gpt-linear": _gpt("linear"),
    "gpt": _gpt("causal:1"),
}


@dataclass(frozen=True)
class Outcome:
    """One run. losses: held out, by step. seconds_per_step: until the slowest rank has ended it, warm-up left out.

    nic_bytes_per_step: sent by all ranks' interfaces in training steps. memory_bytes: by how much each rank's process
    has grown at most until its last step, model, optimizer and buffers included, by the kernel's count.
    ranks_at_work: less than all where a coordinator leaves some idle.
    """

    losses: dict[int, float]
    seconds_per_step: float
    nic_bytes_per_step: float
    memory_bytes: list[int]
    codec_seconds_per_step: float
    ranks_at_work: int


class Watched(RunLoop):
    """A way of training whose steps are watched: when each ends on this rank, what it sends, what memory it takes."""

    ends: list[float]
    sent: int  # in all steps but the first one, before which links are measured
    peak_bytes: int

    def train(self, resumed: bool) -> Any:
        self.ends, self.sent, self.peak_bytes = [], 0, 0
        return super().train(resumed)

    def _train_step(self) -> dict[str, Tensor | float]:
        row = super()._train_step()  # pyright: ignore[reportAbstractUsage]
        self.ends.append(time.perf_counter())
        if self.step == 1:
            self._count_from_here()
        elif self._due(self.config.train.eval_every):
            dist.barrier()  # what is on its way belongs to these steps; the evaluation makes ranks wait anyway
            self.sent += sent_bytes(self.rank) - self._sent_before
        self.peak_bytes = max(self.peak_bytes, measure.peak_memory_bytes(self.device))
        return row

    def _evaluate(self) -> None:
        super()._evaluate()  # pyright: ignore[reportAbstractUsage]
        self._count_from_here()

    def _count_from_here(self) -> None:
        dist.barrier()  # nothing is on its way
        self._sent_before = sent_bytes(self.rank)


class WatchedTrainer(Watched, Trainer):
    """Data-parallel backprop, watched."""


class WatchedLocalTrainer(Watched, LocalTrainer):
    """Partition-wise training, watched; the memory of measuring the cut counts, too."""

    def _prepare(self) -> None:
        super()._prepare()
        cut = self.survey.cut

        def watched(note: Callable[[str], None]) -> Any:
            found = cut(note)
            self.peak_bytes = max(self.peak_bytes, measure.peak_memory_bytes(self.device))
            return found

        self.survey.cut = watched


def run_jobs(worker: Worker, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Trains each job's configuration, one after the other; rank 0 appends the outcome of each to its results.

    jobs: {"name", "settings": overrides, "warm_up": steps that are not timed}.
    """
    device = worker.start(with_overrides(Config(), jobs[0]["settings"]).run)
    for number, job in enumerate(jobs):
        config = with_overrides(Config(), [*job["settings"], f"run.out={folder}/run{number}"])
        data = _data(
            tuple(one for one in job["settings"] if one.startswith(("data.", "model.", "train.seed")))
        )
        gc.collect()  # the run before
        measure.reset_peak_memory(device)
        base = measure.peak_memory_bytes(device)
        progress = progress_for(worker.rank)
        progress.note(f"{job['name']}, {config.train.steps} steps")
        kind = WatchedTrainer if config.local.mode == "end-to-end" else WatchedLocalTrainer
        trainer = kind(config, data, device, progress)
        try:
            summary = trainer.train(resumed=False)
        finally:
            progress.stop()
        per_rank: list[Any] = [None] * worker.size
        dist.all_gather_object(per_rank, (trainer.ends, trainer.sent, trainer.peak_bytes - base))
        if worker.rank == 0:
            rows = RunFolder(Path(config.run.out), writes=False).rows()
            outcome = Outcome(
                {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None},
                _seconds_per_step([ends for ends, _, _ in per_rank], job["warm_up"]),
                sum(sent for _, sent, _ in per_rank) / (summary.steps - 1),
                [grown for _, _, grown in per_rank],
                summary.codec_seconds_per_step,
                _ranks_at_work(trainer),
            )
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps({"name": job["name"], **asdict(outcome)}) + "\n")
            shutil.rmtree(config.run.out)
        dist.barrier()  # the folder is gone, and nobody's next run disturbs another's last one
        del trainer


def _ranks_at_work(trainer: RunLoop) -> int:
    if not isinstance(trainer, LocalTrainer):
        return trainer.world_size
    return len(
        {rank for ranks in trainer.coordinator.history[-1].decision.assignment.ranks for rank in ranks}
    )


def _seconds_per_step(ends: list[list[float]], warm_up: int) -> float:
    """From the end of the warm-up to that of the last step, each on the rank that is there last.

    A partition's first rank runs ahead until its queue is full; the last one shows what all of them get done.
    """
    last = [max(one) for one in zip(*ends, strict=True)]  # one machine, one clock
    return (last[-1] - last[warm_up - 1]) / (len(last) - warm_up)


@cache
def _data(settings: tuple[str, ...]) -> Dataset:
    config = with_overrides(Config(), settings)
    return load_data(config.data, context=config.model.context, seed=config.train.seed)


def main(folder: Annotated[Path, typer.Argument(help="with jobs.json; gets results.jsonl")]) -> None:
    """Run the folder's jobs as one rank of those that a launcher has started."""
    launch(1, run_jobs, json.loads((folder / "jobs.json").read_text()), folder)


if __name__ == "__main__":
    typer.run(main)
