"""The folder of a run: its configuration, metrics, decisions, checkpoints and summary."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from efficient_dl.comm.scalars import ENTROPIES, TOTALS
from efficient_dl.config import Config, load_config, to_toml
from efficient_dl.errors import CheckpointError, ConfigError
from efficient_dl.training.disk import disk_full, writable

CONFIG, METRICS, PARAMETERS, DECISIONS, TIMELINE, SUMMARY, TENSORBOARD, CHECKPOINTS = (
    "config.toml",
    "metrics.jsonl",
    "parameters.jsonl",
    "decisions.jsonl",
    "timeline.svg",
    "summary.json",
    "tensorboard",
    "checkpoints",
)
PLAN, REPLAY = "plan.json", "replay.json"
ENTROPY, ENTROPY_PICTURE = "entropy.jsonl", "entropy.svg"
LOCK = ".lock"


@dataclass(frozen=True)
class Summary:
    """What a run came to; summary.json holds these keys.

    val_loss: mean over the evaluation's predictions, nats. steps: optimizer steps since the run's very start.
    raw_bytes_per_step, wire_bytes_per_step: gradients uncompressed and as sent, summed over ranks; ratio is their
    quotient. bits_per_value: sent bits for a gradient value each way. step_seconds_median and
    compute_seconds_median (forward and backward alone) are means over ranks of each rank's median,
    codec_seconds_per_step of each rank's mean. peak_memory_bytes: the largest rank's. bytes_source:
    "counted" where the meter saw every byte leave, "analytic" for bits = "none", whose bytes torch's own collective
    sends uncounted, "shadow" where they would have been sent. What is not finite, or no longer known, is nan here
    and null in the file.
    """

    val_loss: float
    steps: int
    tokens_or_samples: int
    bits_per_value: float
    raw_bytes_per_step: float
    wire_bytes_per_step: float
    ratio: float
    step_seconds_median: float
    compute_seconds_median: float
    codec_seconds_per_step: float
    peak_memory_bytes: int
    bits: float | str
    seed: int
    world_size: int
    bytes_source: str = "counted"


class RunFolder:
    """Reads and writes a run's files. Only rank 0 writes (`writes`); elsewhere the writing methods do nothing."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._metrics: Any = None
        self._parameters: Any = None
        self._tensorboard: Any = None

    @property
    def timeline(self) -> Path:
        """Where it is drawn which partition trained where."""
        return self.path / TIMELINE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def open(self, config: Config, step: int) -> None:
        """Write config.toml and make metrics.jsonl and TensorBoard go on after `step`. Raises DiskFull, ConfigError."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._replace(CONFIG, to_toml(config, explain=True))
            (self.path / SUMMARY).unlink(missing_ok=True)  # of an earlier, shorter run
            if step == 0:
                self.forget_ahead()
            observed = (ENTROPY,) if (self.path / ENTROPY).exists() else ()
            for name in (METRICS, PARAMETERS, DECISIONS, *observed):
                kept = [row for row in self.rows(name) if row["step"] <= step]
                self._replace(name, "".join(json.dumps(row) + "\n" for row in kept))
            self._metrics = (self.path / METRICS).open("a", buffering=1)
            self._parameters = (self.path / PARAMETERS).open("a", buffering=1)
            self._tensorboard = SummaryWriter(str(self.path / TENSORBOARD), purge_step=step + 1)

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append a row with its "step" to metrics.jsonl and TensorBoard; what is not finite becomes null."""
        if self._metrics is None:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with disk_full(self.path, "the last checkpoint is intact"):
            self._metrics.write(json.dumps(finite) + "\n")
            for key, value in row.items():
                if key != "step":
                    self._tensorboard.add_scalar(_tag(key), value, row["step"])

    def log_event(self, event: str, row: Mapping[str, Any]) -> None:
        """Append a row with its "step", and the event's name as "event", to metrics.jsonl; to TensorBoard as text."""
        if self._metrics is None:
            return
        with disk_full(self.path, "the last checkpoint is intact"):
            self._metrics.write(json.dumps({**row, "event": event}) + "\n")
            self._tensorboard.add_text(event, json.dumps(row), row["step"])

    def ahead(self, step: int, event: str) -> tuple[list[dict[str, Any]], int]:
        """The event's rows after a step, and the last step that was reached; kept until that step is reached again.

        For a run that goes on from before them: `open` cuts them off metrics.jsonl, and the run may crash once more.
        """
        known: dict[str, Any] = {"rows": [], "until_step": 0}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            known = json.loads((self.path / REPLAY).read_text())
        written = self.rows()
        until = max([step, known["until_step"], *(row["step"] for row in written)])
        rows = {row["step"]: row for row in [*known["rows"], *written] if row.get("event") == event}
        after = [rows[one] for one in sorted(rows) if one > step]
        if self.writes and until > step:
            with writable(self.path):
                self._replace(REPLAY, json.dumps({"rows": after, "until_step": until}) + "\n")
        return after, until

    def forget_ahead(self) -> None:
        """What `ahead` keeps does not hold for a run on other ranks, or with other settings."""
        if self.writes:
            (self.path / REPLAY).unlink(missing_ok=True)

    def log_parameters(self, step: int, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Append a row {"step", "parameters": {name: numbers}} to parameters.jsonl, and the numbers to TensorBoard."""
        if self._parameters is None or not rows:
            return
        with disk_full(self.path, "the last checkpoint is intact"):
            self._parameters.write(json.dumps({"step": step, "parameters": rows}) + "\n")
            for name, row in rows.items():
                for key, value in row.items():
                    self._tensorboard.add_scalar(f"compression/{name}/{key}", value, step)

    def log_entropy(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append a measurement's rows, with their "step", to entropy.jsonl; what is not finite becomes null."""
        if not self.writes:
            return
        lines = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in rows
        ]
        with disk_full(self.path, "the last checkpoint is intact"), (self.path / ENTROPY).open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """A number for TensorBoard alone, as its SummaryWriter takes it."""
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(tag, scalar_value, global_step)

    def log_decision(self, row: Mapping[str, Any]) -> None:
        """Append what the coordinator decided, a row with its "step", to decisions.jsonl."""
        if not self.writes:
            return
        with disk_full(self.path, "the last checkpoint is intact"), (self.path / DECISIONS).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, name: str = METRICS) -> list[dict[str, Any]]:
        """The complete rows of a file, none if there is none; a line cut off by a crash is left out."""
        try:
            lines = (self.path / name).read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def step_seconds_median(self) -> float:
        """The median of the rows' step_seconds; nan if no row has any."""
        known = [seconds for row in self.rows() if (seconds := row.get("step_seconds")) is not None]
        return statistics.median(known) if known else math.nan

    def finish(self, summary: Summary) -> None:
        """Write summary.json; what is not finite becomes null."""
        if self.writes:
            values = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in dataclasses.asdict(summary).items()
            }
            with disk_full(self.path, "the last checkpoint is intact"):
                self._replace(SUMMARY, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the files; `log` needs `open` first again."""
        if self._metrics is not None:
            self._metrics.close()
        if self._parameters is not None:
            self._parameters.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._metrics = self._parameters = self._tensorboard = None

    def summary(self) -> Summary | None:
        """The finished run's summary, None if it has not finished."""
        try:
            values: dict[str, Any] = json.loads((self.path / SUMMARY).read_text())
            for key in [key for key, value in values.items() if value is None]:
                values[key] = math.nan
            return Summary(**values)
        except (FileNotFoundError, AttributeError, TypeError, json.JSONDecodeError):
            return None

    def _replace(self, name: str, text: str) -> None:
        """Write a file so that a reader sees the old text or the new one, never a part."""
        partial = self.path / f".{name}.partial"
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / name)


def holds_run(path: Path) -> bool:
    """Whether a run was started in this folder."""
    return (path / CONFIG).exists()


def recorded_config(path: Path) -> Config:
    """The configuration of the run in this folder. Raises CheckpointError if there is none."""
    if not holds_run(path):
        raise CheckpointError(
            "there is no run to resume here",
            expected=CONFIG,
            where=str(path),
            fix="give the --out of a run that was started, or leave --resume out to start one",
        )
    return load_config(path / CONFIG)


def write_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Write what was measured and decided for bits = "auto" to plan.json. Raises DiskFull, ConfigError."""
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
        (path / PLAN).write_text(json.dumps(plan, indent=1) + "\n")


def recorded_plan(path: Path) -> dict[str, Any]:
    """What `write_plan` wrote. Raises OSError or ValueError if it cannot be read."""
    return json.loads((path / PLAN).read_text())


def default_name(config: Config) -> str:
    """A folder's name that tells a run's main settings: gpt-micro-stdlib-adamw-2.0-seed0."""
    model, data = config.model, config.data.name.split(":")[0]
    return f"{model.name}-{model.size}-{data}-{config.optimizer.name}-{config.compression.bits}-seed{config.train.seed}"


def new_folder(parent: Path, name: str) -> Path:
    """Make parent/name, or parent/name-2, … where those exist: no two runs get the same one."""
    path, count = parent / name, 1
    with writable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                count += 1
                path = parent / f"{name}-{count}"


def check_free(path: Path) -> None:
    """Raise ConfigError if a run was started in this folder."""
    if holds_run(path):
        raise ConfigError(
            "this folder holds a run already",
            found=str(path),
            fix="choose another --out, or continue it with --resume",
        )


def locked(path: Path, resumed: bool, wait_seconds: float = 0.0) -> IO[bytes]:
    """Make the folder and lock it; closing the result, or the process's end, releases it.

    wait_seconds: how long another process may still have it locked.
    Raises ConfigError if another process has it locked, or if a run was started there and this one is no resume.
    """
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("ab")
    try:
        _lock(file, wait_seconds)
        if not resumed:
            check_free(path)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            "another run writes here",
            found=str(path / LOCK),
            fix="choose another --out, or wait until that run has ended",
        ) from None
    except ConfigError:
        file.close()
        raise
    except OSError:
        pass  # a file system without locks; the run goes on without one
    return file


def _lock(file: IO[bytes], wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _tag(key: str) -> str:
    of_compression = key in (*TOTALS, *ENTROPIES, "relative_error")
    group = "validation" if key.startswith("val_") else "compression" if of_compression else "training"
    return f"{group}/{key}"
