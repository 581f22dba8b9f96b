"""Ranks that are ahead wait for those behind for as long as these get on, and no longer."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from efficient_dl.errors import TransportError
from efficient_dl.training.pace import Pace


def paces(size: int, timeout: float) -> list[Pace]:
    store = dist.HashStore()
    made = [Pace(store, rank, size, "pace", timeout, lambda: timeout) for rank in range(size)]
    for one in made:
        one.tell(0)
    return made


def test_whoever_meets_waits_for_the_last_longer_than_the_time_out_while_it_gets_on() -> None:
    fast, slow, idle = paces(3, 2.0)
    seen: list[int] = []

    def behind() -> None:
        for step in range(1, 7):
            time.sleep(0.5)
            seen.append(step)
            slow.tell(step)

    thread = threading.Thread(target=behind)
    thread.start()
    fast.tell(6)
    idle.tell(6)
    fast.meet(6)
    met = list(seen)
    thread.join()
    assert met == [1, 2, 3, 4, 5, 6]


def test_whoever_has_nothing_to_do_follows_the_first() -> None:
    one, other, idle = paces(3, 30.0)
    one.tell(4)
    idle.follow(4)
    other.tell(5)
    idle.follow(5)


def test_a_rank_without_progress_is_named() -> None:
    one, other, _ = paces(3, 0.3)
    other.tell(3)
    with pytest.raises(TransportError, match="rank 2 makes no progress") as caught:
        one.follow(4)
    assert "step 0" in str(caught.value)
    one.meet(4)  # goes on: the collective finds out


def test_a_rank_that_has_given_up_is_not_waited_for() -> None:
    one, other = paces(2, 300.0)
    other.give_up()
    with pytest.raises(TransportError, match="rank 1 has ended early"):
        one.meet(1)


def test_one_rank_waits_for_nobody() -> None:
    (alone,) = paces(1, 300.0)
    alone.meet(5)
    alone.follow(5)
