"""What ranks measure before partitions are placed: how fast they are, once, and again where they are on other hosts."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_dl.errors import TransportError
from efficient_dl.local_learning.pieces import pieces_of
from efficient_dl.models import build_model
from efficient_dl.training import Summary, run, run_model
from efficient_dl.training.cutting import Cutter
from efficient_dl.training.run_folder import DECISIONS, RunFolder
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.test_local_training import GPT, config_of, trained


def trained_unevenly(rank: int, out: Path, slow: int, *settings: str) -> Summary:
    """On one rank every piece of the model takes 10 ms longer."""
    if rank == slow:

        def slowed(*arguments: Any) -> torch.nn.Module:
            model = build_model(*arguments)
            for piece in pieces_of(model):
                piece.module.register_forward_pre_hook(lambda *_: time.sleep(0.01))
            return model

        run_model.build_model = slowed
    return run(config_of(out, *settings))


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_gets_less_to_do(tmp_path: Path, slow: int) -> None:
    run_ranks(
        trained_unevenly, 2, tmp_path / "run", slow, *GPT, "local.mode=partitionwise", "local.partitions=4"
    )
    (first, *_) = RunFolder(tmp_path / "run", writes=False).rows(DECISIONS)
    held = [sum(rank in ranks for ranks in first["ranks"]) for rank in range(2)]
    assert held[slow] < held[1 - slow]


def test_a_resumed_run_measures_nothing_again(tmp_path: Path) -> None:
    settings = [*GPT, "local.mode=partitionwise"]
    run_ranks(trained, 2, tmp_path / "run", *settings, "train.steps=4")
    run_ranks(resumed_without_measuring, 2, tmp_path / "run", *settings)


def resumed_without_measuring(rank: int, out: Path, *settings: str) -> None:
    for name in ("measured", "costs", "work_seconds"):
        setattr(Cutter, name, None)
    assert run(config_of(out, *settings), resumed=True).steps == 6


def resumed_elsewhere(rank: int, out: Path, *settings: str) -> int:
    """How often a rank has measured how fast it is, on a machine with another name."""
    socket.gethostname = lambda: f"another host of rank {rank}"
    work, measured = Cutter.work_seconds, 0

    def counted(self: Cutter, batch: Any) -> float:
        nonlocal measured
        measured += 1
        return work(self, batch)

    Cutter.work_seconds = counted  # type: ignore[method-assign]
    run(config_of(out, *settings), resumed=True)
    return measured


def test_ranks_on_other_hosts_measure_themselves_again(tmp_path: Path) -> None:
    settings = [*GPT, "local.mode=partitionwise", "local.stage_steps=2"]
    run_ranks(trained, 2, tmp_path / "run", *settings, "train.steps=4")
    assert all(count >= 1 for count in run_ranks(resumed_elsewhere, 2, tmp_path / "run", *settings))


def trained_with_a_bad_rank(rank: int, out: Path, *settings: str) -> None:
    def fails(self: Cutter, batch: Any) -> float:
        raise ArithmeticError("an error of rank 1 alone")

    if rank == 1:
        Cutter.work_seconds = fails  # type: ignore[method-assign]
    run(config_of(out, *settings))


def test_a_rank_that_fails_in_measuring_itself_ends_the_others(tmp_path: Path) -> None:
    settings = [*GPT, "local.mode=partitionwise", "run.timeout_seconds=300"]
    other, bad = run_failing_ranks(trained_with_a_bad_rank, 2, tmp_path / "run", *settings)
    assert "an error of rank 1 alone" in bad.trace
    assert isinstance(other.error, TransportError), other.trace
    assert other.seconds < 100.0  # less than any time-out
