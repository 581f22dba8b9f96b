"""Signals, hangs and damaged checkpoints on real ranks: where they stop, what they say, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from efficient_dl.training.checkpoint import CheckpointFolder
from tests.distributed.edl_ranks import EdlRanks, edl, free_port

DIGITS = ("train", "--model", "mlp-nano", "--data", "digits", "--bits", "2.0", "--set", "model.dropout=0.2")
CONSTANT = ("--set", "optimizer.schedule=constant")  # so that the number of steps may change


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return CheckpointFolder(out / "checkpoints").load(step).tensors


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_to_one_rank_ends_all_after_the_same_step_with_a_checkpoint(
    number: int, code: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [*DIGITS, *CONSTANT, "--set", "train.checkpoint_every=0", "--out", str(out)]
    ranks = EdlRanks(tmp_path, *[[*words, "--steps", "1000000"]] * 2)
    ranks.wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0)
    pid = ranks._ranks[1].pid
    assert pid
    os.kill(pid, number)
    first, second = ranks.end()
    assert (first.code, second.code) == (code, code), (first, second)
    step = CheckpointFolder(out / "checkpoints").latest()
    assert step
    assert f"after step {step}, whose checkpoint is complete" in first.err
    more = ["--resume-or-start", "--steps", str(step + 3)]
    assert [one.code for one in edl(tmp_path / "b", *words, *more)] == [0, 0]
    whole = [*DIGITS, *CONSTANT, "--out", str(tmp_path / "whole"), "--steps", str(step + 3)]
    assert [one.code for one in edl(tmp_path / "c", *whole)] == [0, 0]
    assert differing(weights(out, step + 3), weights(tmp_path / "whole", step + 3)) == []
