"""Finds the rank that keeps the others waiting: each tells how far it is, and the one that is behind is named.

A rank counts what its main thread begins: forward passes, backward passes, evaluations, checkpoints. Twice a second it
tells the store; a rank that no longer does has stopped, or cannot be reached. When a rank has made no progress for too
long, or a collective has timed out, every rank prints the stacks of its threads, and all end with one verdict.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import math
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from efficient_dl.errors import EdlError, RankStuck, TransportError
from efficient_dl.launching.ends import end_at_once
from efficient_dl.training.stacks import all_stacks, main_thread

_BEAT_SECONDS = 0.5
_SILENT_SECONDS = 2.5  # without a beat, when ranks look at each other
_SPARING_RANKS = 256  # more of them tell in proportion less often, so that rank 0's store keeps up
_JUDGES = 8  # the lowest ranks look at all others; the rest follow
_HEARD_SECONDS = (
    10.0  # how long a verdict waits for all ranks to have heard it, above all before rank 0's store goes
)
_VERDICT_SECONDS = 4 * _BEAT_SECONDS + _SILENT_SECONDS + _HEARD_SECONDS  # from the alarm to all having heard
_LOST_SECONDS = 30.0  # without progress since the store was lost with its rank


@dataclass(frozen=True)
class Position:
    """How far a rank is. beat: a count that grows while the rank lives. begun: of what its main thread has begun."""

    beat: int
    begun: int
    step: int
    phase: str
    idle_seconds: float
    place: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}, for {self.idle_seconds:.0f} s; main thread {self.place}"


@dataclass(frozen=True)
class Verdict:
    """What all ranks end with. printer: the rank that prints it. silent: ranks that give no sign of life."""

    printer: int
    silent: list[int]
    problem: str
    details: dict[str, str]

    def error(self) -> EdlError:
        kind = TransportError if self.silent else RankStuck
        return kind(self.problem, **self.details)


class Watchdog:
    """One rank's. `at` is called by the main thread, `poll` several times a second by a thread with its own store.

    seconds: without progress until the alarm; 0: never, only a collective's time-out raises it. in_step: see `judged`.
    """

    def __init__(self, rank: int, size: int, prefix: str, seconds: float, in_step: bool = True) -> None:
        self._rank, self._size, self._prefix, self._seconds = rank, size, prefix, seconds
        self._in_step = in_step
        self._step, self._phase, self._begun, self._since = 0, "preparing", 0, time.monotonic()
        self._beat, self._beat_at = 0, -math.inf
        self._pace = max(1.0, size / _SPARING_RANKS)
        self._alarm: str | None = None  # why this rank raises it
        self._alarmed = threading.Event()
        self._main_waits = False  # for the verdict, and then ends the process
        self._first_look: tuple[float, list[Position | None]] | None = None
        self._judged_at: float | None = None
        self._heard = threading.Event()  # the verdict, by all ranks that live
        self._lost_at: float | None = None
        self.verdict: Verdict | None = None

    def at(self, phase: str, step: int) -> None:
        """The main thread begins something: that is progress."""
        self._step, self._phase, self._since = step, phase, time.monotonic()
        self._begun += 1

    def after_timeout(self, found: str) -> Verdict | None:
        """A collective of this rank has timed out: who is to blame, None if the ranks cannot tell. Takes seconds."""
        self._main_waits = True
        self._alarm = self._alarm or f"a collective of rank {self._rank} has timed out: {found}"
        self._heard.wait(_VERDICT_SECONDS * self._pace)
        return self.verdict

    def follows(self, seconds: float) -> bool:
        """Whether an alarm was raised, here or elsewhere; waits so long for one."""
        return self._alarmed.wait(seconds)

    def poll(self, store: dist.Store) -> None:
        """Tell where this rank is, raise the alarm if it is due, and follow others'."""
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_SECONDS * self._pace:
            self._beat, self._beat_at = self._beat + 1, now
            store.set(self._key(self._rank), json.dumps(dataclasses.asdict(self._position())))
            self._arm_for_a_held_lock()
        if self._alarm is None and 0 < self._seconds < now - self._since:
            self._alarm = (
                f"rank {self._rank} has made no progress for {self._seconds:g} s (run.watchdog_seconds)"
            )
        if self._judged_at is not None:
            self._finish(store, now - self._judged_at)
            return
        if self._first_look is not None:
            if now > self._first_look[0] + _SILENT_SECONDS * self._pace:
                self._judge(store, now)
        elif self._alarm is not None or store.check([f"{self._prefix}/alarm"]):
            if self._alarm is not None:
                store.compare_set(f"{self._prefix}/alarm", "", self._alarm)
            self._alarmed.set()
            why = store.get(f"{self._prefix}/alarm").decode()
            _print(f"rank {self._rank}: {why}\nrank {self._rank}: {self._position()}\n{all_stacks()}")
            self._first_look = (now, self._look(store) if self._rank < _JUDGES else [])

    def store_is_lost(self) -> None:
        """What is left without a store: to end a main thread that its lost peers leave waiting for ever."""
        self._heard.set()
        if self.verdict is not None and not self._main_waits:
            self._end()
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        if now - max(self._lost_at, self._since) > _LOST_SECONDS:
            _print(
                f"rank {self._rank}: rank 0 has ended, this rank has not: {self._position()}\n{all_stacks()}"
            )
            end_at_once(TransportError.exit_code)

    def close(self) -> None:
        """Training is over."""
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/at/{rank}"

    def _position(self) -> Position:
        idle = time.monotonic() - self._since
        return Position(self._beat, self._begun, self._step, self._phase, round(idle, 1), main_thread())

    def _look(self, store: dist.Store) -> list[Position | None]:
        keys = [self._key(rank) for rank in range(self._size)]
        return [Position(**json.loads(store.get(key))) if store.check([key]) else None for key in keys]

    def _judge(self, store: dist.Store, now: float) -> None:
        """Take over the verdict, or reach one; for the others, only after the judges have had their time."""
        assert self._first_look is not None
        key = f"{self._prefix}/verdict"
        late = now > self._first_look[0] + _HEARD_SECONDS * self._pace
        if self._rank >= _JUDGES and not late and not store.check([key]):
            return
        text = "null"
        if self._rank < _JUDGES:
            why = store.get(f"{self._prefix}/alarm").decode()
            found = judged(self._first_look[1], self._look(store), why, self._in_step)
            text = json.dumps(None if found is None else dataclasses.asdict(found))
        agreed: Any = json.loads(store.compare_set(key, "", text))  # the first rank's
        self.verdict = None if agreed is None else Verdict(**agreed)
        self._judged_at = time.monotonic()
        store.add(f"{self._prefix}/heard", 1)

    def _finish(self, store: dist.Store, seconds: float) -> None:
        """End the process, whose main thread hangs; one that waits for the verdict ends it itself."""
        silent = 0 if self.verdict is None else len(self.verdict.silent)
        late = seconds > _HEARD_SECONDS * self._pace
        if late or store.add(f"{self._prefix}/heard", 0) >= self._size - silent:
            self._heard.set()
            if late or (self.verdict is not None and not self._main_waits):
                self._end()

    def _end(self) -> None:
        """The main thread hangs, and so cannot end the process."""
        if self.verdict is None:
            end_at_once(TransportError.exit_code)
        error = self.verdict.error()
        if self.verdict.printer == self._rank:
            _print(f"{type(error).__name__}: {error}")
        end_at_once(error.exit_code)

    def _arm_for_a_held_lock(self) -> None:
        """If no thread gets Python's lock any more, only C code can still print the stacks."""
        if self._seconds > 0 and self._beat % 10 == 1:
            faulthandler.dump_traceback_later(self._seconds + 10 * _BEAT_SECONDS)


def judged(
    before: list[Position | None], now: list[Position | None], why: str, in_step: bool = True
) -> Verdict | None:
    """Who keeps the others waiting: ranks without a beat between two looks, else those that have begun the least.

    in_step: whether all ranks begin the same; where some run ahead by design, the one behind need not be to blame.
    None if nobody is behind, or nothing follows from that, and a collective's own time-out says more.
    """
    silent = [
        rank
        for rank, (old, new) in enumerate(zip(before, now, strict=True))
        if new is None or (old is not None and old.beat == new.beat)
    ]
    alive = {rank: one for rank, one in enumerate(now) if one is not None and rank not in silent}
    if not alive:
        return None
    printer = min(alive)
    if silent:
        last = "; ".join(f"rank {rank}: {now[rank] or 'never seen'}" for rank in silent)
        return Verdict(
            printer,
            silent,
            f"no sign of life from rank {', '.join(map(str, silent))}",
            {
                "found": f"{why}; last known of {last}",
                "fix": "its process is stopped or dead, or its host cannot be reached; then --resume",
            },
        )
    least = min(one.begun for one in alive.values())
    behind = [rank for rank, one in alive.items() if one.begun == least]
    if not in_step or len(behind) == len(alive):
        if "run.watchdog_seconds" not in why:
            return None
        positions = "; ".join(f"rank {rank}: {one}" for rank, one in alive.items())
        return Verdict(
            printer,
            [],
            "no rank makes progress",
            {
                "found": f"{why}; {positions}",
                "fix": "see the stacks above; a longer run.watchdog_seconds if all is well",
            },
        )
    positions = "; ".join(f"rank {rank}: {alive[rank]}" for rank in behind)
    others = "; ".join(f"rank {rank}: {one}" for rank, one in alive.items() if rank not in behind)
    return Verdict(
        printer,
        [],
        f"rank {', '.join(map(str, behind))} makes no progress, and the others wait for it",
        {
            "found": f"{why}; {positions}",
            "differs": others,
            "fix": "see its stacks above; then --resume, or a longer run.watchdog_seconds or run.timeout_seconds",
        },
    )


def _print(text: str) -> None:
    """In one write, so that several ranks' lines do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
