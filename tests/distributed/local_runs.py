"""Short layer-wise and partition-wise runs inside of processes that have a process group."""

from __future__ import annotations

from pathlib import Path

import torch

from efficient_dl.config import Config, with_overrides
from efficient_dl.training import Summary, run
from efficient_dl.training.checkpoint import CheckpointFolder
from efficient_dl.training.survey import Survey

GPT = [
    "model.name=gpt", "model.size=nano", "model.context=16", "model.tie_weights=false", "data.name=stdlib",
    "data.batch_size=2", "compression.bits=lossless", "local.balance=parameters",
]  # fmt: skip
RESNET = [
    "model.name=resnet18", "model.size=nano", "data.name=digits", "data.batch_size=4", "compression.bits=2.0",
    "local.balance=parameters",
]  # fmt: skip


def config_of(out: Path, *settings: str) -> Config:
    base = [
        "train.eval_batches=2",
        "train.log_every=1",
        "train.steps=6",
        "local.partitions=2",
        f"run.out={out}",
    ]
    return with_overrides(Config(), [*base, *settings])


def measure_no_ranks() -> None:
    """So that each partition lies on a rank of its own, however busy the machine is: its bits are to be compared."""
    Survey.here = lambda self, work, link: (None, None)  # type: ignore[method-assign]


def trained(rank: int, out: Path, *settings: str) -> tuple[Summary, dict[str, torch.Tensor]]:
    """A run's summary, and all tensors of its last checkpoint; nothing is known of ranks and links."""
    measure_no_ranks()
    summary = run(config_of(out, *settings))
    folder = CheckpointFolder(out / "checkpoints")
    latest = folder.latest()
    assert latest is not None
    return summary, folder.load(latest).tensors


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    keys = sorted(one.keys() ^ other.keys())
    return keys + [key for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])]
