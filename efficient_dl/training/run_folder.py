"""The folder of a run: config.toml, metrics.jsonl, tensorboard/, checkpoints/, summary.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_dl.config import Config, load_config, to_toml
from efficient_dl.errors import CheckpointError, ConfigError
from efficient_dl.training.disk import disk_full

CONFIG, METRICS, SUMMARY, TENSORBOARD, CHECKPOINTS = (
    "config.toml",
    "metrics.jsonl",
    "summary.json",
    "tensorboard",
    "checkpoints",
)


@dataclass(frozen=True)
class Summary:
    """What a run came to; summary.json holds these keys.

    val_loss: mean over the evaluation's predictions, nats. steps: optimizer steps since the run's very start.
    raw_bytes_per_step, wire_bytes_per_step: gradients uncompressed and as sent, summed over ranks; ratio is their
    quotient. bits_per_value: sent bits for a gradient value each way. step_seconds_median and
    compute_seconds_median (forward and backward alone) are means over ranks of each rank's median,
    codec_seconds_per_step of each rank's mean. peak_memory_bytes: the largest rank's. bytes_source:
    "counted" where the meter saw every byte leave, "analytic" for bits = "none", whose bytes torch's own collective
    sends uncounted, "shadow" where they would have been sent.
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
        self._tensorboard: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def open(self, config: Config, step: int) -> None:
        """Write config.toml and make metrics.jsonl and TensorBoard go on after `step`. Raises DiskFull, ConfigError."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        try:
            with disk_full(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._replace(CONFIG, to_toml(config))
                (self.path / SUMMARY).unlink(missing_ok=True)  # of an earlier, shorter run
                kept = [row for row in self.rows() if row["step"] <= step]
                self._replace(METRICS, "".join(json.dumps(row) + "\n" for row in kept))
                self._metrics = (self.path / METRICS).open("a", buffering=1)
                self._tensorboard = SummaryWriter(str(self.path / TENSORBOARD), purge_step=step + 1)
        except OSError as error:
            raise ConfigError(
                "the run's folder cannot be written",
                found=str(error),
                where=str(self.path),
                fix="choose another --out",
            ) from None

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

    def rows(self) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl, none if there is no file; a line cut off by a crash is left out."""
        try:
            lines = (self.path / METRICS).read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def finish(self, summary: Summary) -> None:
        if self.writes:
            with disk_full(self.path, "the last checkpoint is intact"):
                self._replace(SUMMARY, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")

    def close(self) -> None:
        """Close the files; `log` needs `open` first again."""
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._metrics = self._tensorboard = None

    def summary(self) -> Summary | None:
        """The finished run's summary, None if it has not finished."""
        try:
            return Summary(**json.loads((self.path / SUMMARY).read_text()))
        except (FileNotFoundError, TypeError, json.JSONDecodeError):
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


def default_name(config: Config) -> str:
    """A folder's name that tells a run's main settings: gpt-micro-stdlib-adamw-2.0-seed0."""
    model, data = config.model, config.data.name.split(":")[0]
    return f"{model.name}-{model.size}-{data}-{config.optimizer.name}-{config.compression.bits}-seed{config.train.seed}"


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or parent/name-2, … if runs were started in those before."""
    path, count = parent / name, 1
    while holds_run(path):
        count += 1
        path = parent / f"{name}-{count}"
    return path


def _tag(key: str) -> str:
    group = (
        "validation" if key.startswith("val_") else "bytes" if "bytes" in key or "bits" in key else "training"
    )
    return f"{group}/{key}"
