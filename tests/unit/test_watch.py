"""What ranks agree on when one of them is to end, and whom they blame when one does not move."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from efficient_dl.training.common_stop import CommonStop
from efficient_dl.training.signals import Stopped
from efficient_dl.training.watchdog import Position, judged


def stops(size: int) -> list[CommonStop]:
    return [CommonStop(rank, size, "run") for rank in range(size)]


def agree(ranks: list[CommonStop], store: dist.Store) -> None:
    for _ in range(2):
        for rank in ranks:
            rank.poll(store)


def test_all_ranks_stop_after_the_last_step_that_any_of_them_has_begun() -> None:
    store, ranks = dist.HashStore(), stops(3)
    for rank, begun in zip(ranks, (4, 6, 5), strict=True):
        assert all(rank.may_begin(step) for step in range(1, begun + 1))
    ranks[0].ask(signal.SIGUSR1)
    agree(ranks, store)
    assert [rank.may_begin(6) for rank in ranks] == [True] * 3
    assert [rank.may_begin(7) for rank in ranks] == [False] * 3
    assert {rank.number for rank in ranks} == {signal.SIGUSR1}


def test_two_requests_are_one() -> None:
    store, ranks = dist.HashStore(), stops(2)
    ranks[0].ask(signal.SIGTERM)
    ranks[1].ask(signal.SIGUSR1)
    agree(ranks, store)
    assert ranks[0].number == ranks[1].number
    assert not ranks[0].may_begin(1) and not ranks[1].may_begin(1)


def test_a_rank_that_ended_otherwise_is_not_waited_for() -> None:
    store, ranks = dist.HashStore(), stops(2)
    ranks[1].give_up(store)
    ranks[0].ask(signal.SIGTERM)
    ranks[0].poll(store)
    with pytest.raises(Stopped, match="SIGTERM"):
        ranks[0].may_begin(1)


def test_with_the_store_lost_only_a_rank_that_was_asked_ends() -> None:
    asked, other = stops(2)
    asked.ask(signal.SIGTERM)
    for rank in (asked, other):
        rank.store_is_lost()
    assert other.may_begin(1)
    with pytest.raises(Stopped):
        asked.may_begin(1)


def position(begun: int, beat: int = 1, phase: str = "backward") -> Position:
    return Position(beat, begun, 7, phase, 3.0, "in barrier")


@pytest.mark.parametrize(
    ("begun", "beats", "why", "found"),
    [
        ((9, 8, 9), (2, 2, 2), "time-out", "rank 1 makes no progress"),
        ((9, 8, 9), (2, 1, 2), "time-out", "no sign of life from rank 1"),
        ((9, 9, 9), (2, 2, 2), "time-out", None),  # torch's own error says more
        ((9, 9, 9), (2, 2, 2), "run.watchdog_seconds", "no rank makes progress"),
        ((8, 8, 9), (2, 2, 2), "time-out", "rank 0, 1 makes no progress"),
    ],
)
def test_the_rank_that_is_behind_is_blamed(
    begun: tuple[int, ...], beats: tuple[int, ...], why: str, found: str | None
) -> None:
    before: list[Position | None] = [position(one) for one in begun]
    now: list[Position | None] = [position(one, beat) for one, beat in zip(begun, beats, strict=True)]
    verdict = judged(before, now, why)
    if found is None:
        assert verdict is None
        return
    assert verdict is not None
    assert verdict.problem.startswith(found)
    assert verdict.printer == 0


@pytest.mark.parametrize("why", ["time-out", "run.watchdog_seconds"])
def test_where_ranks_run_ahead_nobody_is_blamed_for_being_behind(why: str) -> None:
    before: list[Position | None] = [position(12), position(9)]
    now: list[Position | None] = [position(12, 2), position(9, 2)]
    verdict = judged(before, now, why, in_step=False)
    assert (verdict is None) == (why == "time-out")
    assert verdict is None or verdict.problem == "no rank makes progress"
    silent = judged(before, [position(12), position(9, 2)], why, in_step=False)
    assert silent is not None and silent.silent == [0]


def test_a_rank_that_was_never_seen_is_silent() -> None:
    verdict = judged([position(3), None], [position(3, beat=2), None], "time-out")
    assert verdict is not None and verdict.silent == [1]
    assert verdict.error().exit_code == 6


# A main thread that waits where no Python runs.
WAITS = """
import ctypes, sys
from efficient_dl.training.signals import Stopped, first_asks, handled

try:
    with handled([]), first_asks(lambda number: print("asked", number, flush=True), float(sys.argv[1])):
        print("ready", flush=True)
        for _ in range(100):
            ctypes.CDLL(None).poll(None, 0, 60_000)
except Stopped as stopped:  # a signal may interrupt poll, and so reach Python
    sys.exit(128 + stopped.number)
"""


@pytest.mark.slow
@pytest.mark.parametrize("grace", [1.0, 60.0])
def test_a_main_thread_outside_of_python_ends_after_its_grace_or_a_second_signal(grace: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(grace)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == f"asked {int(signal.SIGTERM)}\n"
        if grace > 1.0:
            process.send_signal(signal.SIGTERM)  # at once: the same request, seen twice
            time.sleep(2.1)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 143
    assert ("no checkpoint was complete after 1 s" in printed) == (grace == 1.0)
