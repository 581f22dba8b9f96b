"""Signals, hangs and damaged checkpoints on real ranks: where they stop, what they say, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_dl.config import Config, with_overrides
from efficient_dl.training import run_worker
from efficient_dl.training.checkpoint import CheckpointFolder
from efficient_dl.training.end_to_end import Trainer
from efficient_dl.training.run_folder import RunFolder
from efficient_dl.training.worker import work
from tests.distributed.edl_ranks import EdlRanks, edl

DIGITS = ("train", "--model", "mlp-nano", "--data", "digits", "--bits", "2.0", "--set", "model.dropout=0.2")
CONSTANT = ("--set", "optimizer.schedule=constant")  # so that the number of steps may change


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return CheckpointFolder(out / "checkpoints").load(step).tensors


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


PARTITIONS = (
    "train", "--model", "gpt-nano", "--data", "stdlib", "--bits", "2.0", "--batch-size", "2", "--partitions", "2",
    "--mode", "partitionwise", "--set", "model.context=16", "--set", "model.tie_weights=false",
    "--set", "local.balance=parameters", "--set", "local.stage_steps=6", "--set", "train.eval_batches=2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "job"),
    [(signal.SIGTERM, 143, DIGITS), (signal.SIGUSR1, 138, DIGITS), (signal.SIGUSR1, 138, PARTITIONS)],
)
def test_a_signal_to_one_rank_ends_all_after_the_same_step_with_a_checkpoint(
    number: int, code: int, job: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    soon = ("--set", "train.checkpoint_every=0", "--set", "train.log_every=1")
    words = [*job, *CONSTANT, *soon, "--out", str(out)]
    ranks = EdlRanks(tmp_path, *[[*words, "--steps", "1000000"]] * 2)
    ranks.wait_for(
        lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0, 120
    )
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
    whole = [*job, *CONSTANT, "--out", str(tmp_path / "whole"), "--steps", str(step + 3)]
    assert [one.code for one in edl(tmp_path / "c", *whole)] == [0, 0]
    assert differing(weights(out, step + 3), weights(tmp_path / "whole", step + 3)) == []


def stop_in_step_5(words: list[str]) -> None:
    """A worker of two; rank 1 hangs in the data of step 5, or stops there as a machine in trouble does."""
    how, *settings = words
    batch = Trainer._batch

    def hanging(self: Trainer, part: int) -> Any:
        if self.step == 5 and self.rank == 1:
            if how == "hang":
                threading.Event().wait()
            while self.watch.dog._beat < 2:  # a fast machine is here before its first sign of life is told
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGSTOP)
        return batch(self, part)

    Trainer._batch = hanging  # type: ignore[method-assign]
    base = ["model.name=mlp", "model.size=nano", "data.name=digits", "compression.bits=2.0"]
    work(run_worker, [with_overrides(Config(), [*base, *settings])])


def hanging_ranks(folder: Path, how: str, *settings: str) -> EdlRanks:
    words = [how, f"run.out={folder / 'run'}", *settings]
    return EdlRanks(folder, words, words, main=stop_in_step_5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [["run.watchdog_seconds=8"], ["run.watchdog_seconds=0", "run.timeout_seconds=8"]]
)
def test_a_rank_that_hangs_is_named_with_its_stack_and_ends_the_run(
    settings: list[str], tmp_path: Path
) -> None:
    ended = hanging_ranks(tmp_path, "hang", *settings).end(timeout=250)
    printed = [rank.err for rank in ended]
    assert [rank.code for rank in ended] == [10, 10], printed
    assert printed[0].count("RankStuck: rank 1 makes no progress, and the others wait for it") == 1, printed
    assert "rank 1: step 6, forward, for" in printed[0]
    assert "in hanging" in printed[1] and "in backward" in printed[1], printed[1]
    assert "rank 0: step 6, backward, with gradients' all-reduce" in printed[0]
    if "run.watchdog_seconds=8" in settings:  # else they have given up
        assert ": in _PairwiseWork._finish\n" in printed[0], printed[0]  # a communication thread
    assert "RankStuck" not in printed[1]


@pytest.mark.slow
def test_a_stopped_process_is_named_as_giving_no_sign_of_life(tmp_path: Path) -> None:
    ranks = hanging_ranks(tmp_path, "stop", "run.timeout_seconds=8")
    first, second = ranks._ranks
    first.join(250)
    second.kill()
    ended, _ = ranks.end()
    assert ended.code == 6, ended
    assert "TransportError: no sign of life from rank 1" in ended.err
    assert "last known of rank 1: step" in ended.err


@pytest.mark.slow
def test_another_number_of_workers_takes_the_same_samples_and_refuses_uneven_shares(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*DIGITS, "--optimizer", "sgd", "--batch-size", "6", "--out", str(out), "--resume-or-start"]
    assert [one.code for one in edl(tmp_path / "a", *words, "--steps", "2")] == [0, 0]
    fewer = edl(tmp_path / "b", *words, "--steps", "4", ranks=1)
    assert [one.code for one in fewer] == [0], fewer
    assert "a step still takes 12 samples, now 6 a worker at once, 2 times" in fewer[0].out
    assert "residuals are redistributed" in fewer[0].err
    more = edl(
        tmp_path / "c", *words, "--steps", "6", ranks=3
    )  # config.toml now says 6, 2 times, for one worker
    assert [one.code for one in more] == [0] * 3, more
    assert "a step still takes 12 samples, now 4 a worker at once, 1 times" in more[0].out
    assert RunFolder(out, writes=False).summary().tokens_or_samples == 6 * 12  # type: ignore[union-attr]
    uneven = edl(tmp_path / "d", "train", "--out", str(out), "--resume", "--steps", "8", ranks=5)
    assert [one.code for one in uneven] == [7] * 5
    assert "a divisor of 12" in uneven[0].err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks_and_the_run_ends_as_if_undisturbed(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    every = [*DIGITS, *CONSTANT, "--set", "train.checkpoint_every=2", "--set", "train.keep_checkpoints=9"]
    assert [one.code for one in edl(tmp_path / "a", *every, "--steps", "6", "--out", str(out))] == [0, 0]
    whole = weights(out, 6)
    flip_a_bit(out / "checkpoints" / "step-000006" / "__1_0.distcp")
    (out / "checkpoints" / "step-000004" / "__0_0.distcp").unlink()
    again = edl(tmp_path / "b", "train", "--out", str(out), "--resume")
    assert [one.code for one in again] == [0, 0], again
    assert "step 6 is damaged (__1_0.distcp is not what was written: other bits)" in again[0].out
    assert "step 4 is damaged (__0_0.distcp cannot be read" in again[0].out
    assert "the run goes on from step 2" in again[0].out
    assert differing(weights(out, 6), whole) == []
    for step in CheckpointFolder(out / "checkpoints").steps():
        flip_a_bit(out / "checkpoints" / f"step-{step:06d}" / ".metadata")
    none = edl(tmp_path / "c", "train", "--out", str(out), "--resume")
    assert [one.code for one in none] == [7, 7]
    assert "CheckpointError: all checkpoints are damaged" in none[0].err


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_ranks_killed_while_they_write_a_checkpoint_leave_the_one_before(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*DIGITS, "--set", "train.checkpoint_every=1", "--out", str(out)]
    ranks = EdlRanks(tmp_path, *[[*words, "--steps", "1000000"]] * 2)
    checkpoints = CheckpointFolder(out / "checkpoints")
    ranks.wait_for(lambda: checkpoints.latest() is not None and any(checkpoints.path.glob(".*.partial")), 120)
    ranks.signal(signal.SIGKILL)
    assert [one.code for one in ranks.end()] == [-signal.SIGKILL] * 2
    step, notes = checkpoints.newest_intact()
    assert step and notes == []
    again = edl(tmp_path / "b", *words, "--resume-or-start", "--steps", str(step + 1))
    assert [one.code for one in again] == [0, 0], again
    assert not any(checkpoints.path.glob(".*"))
