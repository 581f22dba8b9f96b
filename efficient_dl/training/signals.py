"""Signals that end a worker: at once, or after a step that all ranks agree on.

Python runs a signal's handler on the main thread only, and only between two of its instructions; a main thread that
waits inside a collective runs none. So every signal is also read from a pipe by a thread, which ends the process if
the main thread does not.
"""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from efficient_dl.launching.ends import end_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACEFUL = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send them some time before they kill
STACKS = signal.SIGUSR2  # prints the stacks of all threads, and the process goes on

_SAME_SECONDS = 2.0  # Slurm signals all processes, and torchrun forwards its own: one request, seen twice
_MAIN_SECONDS = 8.0  # how long the main thread may take to notice that it is to end at once


class Stopped(BaseException):
    """A signal asks this process to end. No Exception, so that no library swallows it.

    saved: the step whose checkpoint all ranks wrote before, None if they ended at once.
    """

    def __init__(self, number: int, saved: int | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.saved is None:
            return f"Stopped by {name}."
        return (
            f"Stopped by {name} after step {self.saved}, whose checkpoint is complete; go on with --resume."
        )


class _Requests:
    """What signals have asked for. The reading thread decides it, the handler on the main thread follows."""

    def __init__(self) -> None:
        self.ask: Callable[[int], None] | None = None  # takes a first, graceful signal
        self.grace_seconds = 0.0
        self.asked: tuple[int, float] | None = None  # the signal, and when it came
        self.at_once = False

    def may_wait(self, number: int) -> bool:
        """Whether this signal only asks for the end of a step."""
        return self.ask is not None and number in GRACEFUL and not self.at_once

    def seconds_left(self) -> float | None:
        """Until the process ends in any case; None while nothing has asked for it."""
        if self.ask is None or self.asked is None:
            return None
        return max(0.0, self.asked[1] + self.grace_seconds - time.monotonic())


_requests = _Requests()


@contextlib.contextmanager
def handled(stops: list[Stopped]) -> Iterator[None]:
    """Inside, a signal raises Stopped in the main thread, which is also put into stops; or see `first_asks`.

    A main thread that does not notice within seconds is ended with its process. SIGUSR2 prints all stacks.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _requests.may_wait(number):
            return  # the reading thread passes it on
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)  # once is enough
        stops.append(Stopped(number))
        raise stops[0]

    chosen = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, stop) for number in chosen}
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    old_sink = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    ended = threading.Event()
    reader = threading.Thread(target=_read, args=(source, ended), name="edl-signals", daemon=True)
    reader.start()
    with contextlib.suppress(ValueError, RuntimeError, OSError):  # stderr without a file descriptor
        faulthandler.register(STACKS, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_sink)
        ended.set()
        os.close(sink)  # ends the thread, which closes the other end
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def first_asks(ask: Callable[[int], None], grace_seconds: float) -> Iterator[None]:
    """Inside, the first SIGTERM or SIGUSR1 calls ask(number) on another thread; a later one ends the process at once.

    Signals within two seconds count as one. grace_seconds: after them the process ends in any case.
    """
    _requests.ask, _requests.grace_seconds, _requests.asked = ask, grace_seconds, None
    try:
        yield
    finally:
        _requests.ask = None


def _read(source: int, ended: threading.Event) -> None:
    """Pass graceful signals on, and end the process where its main thread does not in time."""
    with open(source, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], _requests.seconds_left())[0]:
                if _requests.seconds_left() == 0.0 and _requests.asked is not None:
                    _end(_requests.asked[0], late=True)
                continue
            data = pipe.read(1)
            if not data:
                return
            number = data[0]
            if number not in SIGNALS or _requests.at_once:
                continue
            if _requests.may_wait(number) and _requests.ask is not None:
                if _requests.asked is None:
                    _requests.asked = (number, time.monotonic())
                    _requests.ask(number)
                    continue
                if time.monotonic() - _requests.asked[1] < _SAME_SECONDS:
                    continue
                _requests.at_once = True
                _thread.interrupt_main(number)  # the handler, once more, and now it raises
            if not ended.wait(_MAIN_SECONDS):
                _end(number)


def _end(number: int, late: bool = False) -> None:
    if late:
        sys.stderr.write(
            f"Stopped by {signal.Signals(number).name}: no checkpoint was complete after "
            f"{_requests.grace_seconds:g} s (run.grace_seconds); the one before is intact.\n"
        )
        sys.stderr.flush()
    end_at_once(128 + number)
