"""`edl train` with bits="auto" builds DDP's buckets in the planned size, and a resumed run builds the same ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_dl.config import Config, with_overrides
from efficient_dl.training import run
from efficient_dl.training.checkpoint import CheckpointFolder
from efficient_dl.training.end_to_end import Trainer
from tests.distributed.launch import run_ranks
from tests.distributed.measured_links import measuring, network

MIB = 1 << 20


def trained(rank: int, out: Path, megabits: float, resumed: bool = False) -> list[int]:
    """Trains on links that exist in numbers alone; the sizes of buckets that DDP was asked for, 0: its own."""
    settings = [
        "model.name=mlp", "model.size=small", "data.name=digits", "train.steps=8", "train.checkpoint_every=4",
        "train.keep_checkpoints=9", "compression.bits=auto", "compression.replan=false", f"run.out={out}",
    ]  # fmt: skip
    asked: list[int] = []

    arguments_of = Trainer._ddp_arguments

    def noted(trainer: Trainer) -> dict[str, Any]:
        arguments = arguments_of(trainer)
        asked.append(round(arguments.get("bucket_cap_mb", 0) * MIB))
        return arguments

    Trainer._ddp_arguments = noted
    with measuring(network((1, 1), megabits, backward=10.0, family="bits")):
        run(with_overrides(Config(), settings), resumed=resumed)
    return asked


def test_planned_buckets_are_built_and_a_resumed_run_builds_the_same(tmp_path: Path) -> None:
    """The layers' gradients are there at different times, and late: smaller buckets leave the last one less to send."""
    first, stopped = tmp_path / "first", tmp_path / "stopped"
    assert run_ranks(trained, 2, first, 0.4) == [[MIB]] * 2
    decision = json.loads((first / "plan.json").read_text())["decision"]
    assert (decision["bits"], decision["bucket_bytes"]) == ("2.0", MIB)
    shutil.copytree(first, stopped)
    (stopped / "summary.json").unlink()
    shutil.rmtree(CheckpointFolder(stopped / "checkpoints").path / "step-000008")
    # What the links are like by now does not count.
    assert run_ranks(trained, 2, stopped, 1e6, True) == [[MIB]] * 2
    expected, found = (
        dict(CheckpointFolder(one / "checkpoints").load(8).tensors) for one in (first, stopped)
    )
    assert all(torch.equal(one, found[name]) for name, one in expected.items())


@pytest.mark.parametrize("megabits", [1e6])
def test_where_nothing_is_to_be_gained_buckets_are_ddps_own(tmp_path: Path, megabits: float) -> None:
    assert run_ranks(trained, 2, tmp_path / "run", megabits) == [[0]] * 2
