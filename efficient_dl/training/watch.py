"""What goes on beside a run on every rank: the watchdog, and the agreement on where to stop."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol

import torch.distributed as dist

from efficient_dl.config import RunConfig
from efficient_dl.training.common_stop import CommonStop
from efficient_dl.training.signals import first_asks
from efficient_dl.training.watchdog import Verdict, Watchdog

_POLL_SECONDS = 0.2
_SPARING_RANKS = 256  # more of them ask rank 0's store in proportion less often
_FOLLOW_SECONDS = 0.5
_GIVE_UP_SECONDS = 1.0
_CONNECT_SECONDS = 30.0
_STARTED = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # by a parent that stays until the end
_LOST = (dist.DistError, RuntimeError, OSError)


class Watch(Protocol):
    """What a training loop tells, and asks."""

    @property
    def number(self) -> int | None:
        """The signal that ends the run, once `may_begin` has said no."""
        ...

    def at(self, phase: str, step: int) -> None:
        """Something begins on the main thread: progress."""
        ...

    def may_begin(self, step: int) -> bool:
        """Whether the step is to be trained; False on all ranks alike, once one was asked to end."""
        ...


class Unwatched:
    """For loops in processes whose signals and hangs are their owner's business."""

    number: int | None = None

    def at(self, phase: str, step: int) -> None:
        """See `Watch.at`."""

    def may_begin(self, step: int) -> bool:
        """See `Watch.may_begin`."""
        return True


class _RunWatch:
    """The thread, and the two that it serves."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, run: RunConfig, in_step: bool
    ) -> None:
        self.stop = CommonStop(rank, size, f"{name}/stop")
        self.dog = Watchdog(rank, size, f"{name}/dog", run.watchdog_seconds, in_step)
        self._workers_store, self.store = store, _own_connection(store)
        self._closed = threading.Event()
        self._poll_seconds = _POLL_SECONDS * max(1.0, size / _SPARING_RANKS)
        self._agent = os.getppid() if any(name in os.environ for name in _STARTED) else None
        threading.Thread(target=self._run, name="edl-watch", daemon=True).start()

    @property
    def number(self) -> int | None:
        """See `Watch.number`."""
        return self.stop.number

    def at(self, phase: str, step: int) -> None:
        """See `Watch.at`."""
        self.dog.at(phase, step)

    def may_begin(self, step: int) -> bool:
        """See `Watch.may_begin`."""
        return self.stop.may_begin(step)

    def give_up(self) -> None:
        """Tell the others that this rank ends early, if that takes no longer than a second."""

        def tell() -> None:
            with contextlib.suppress(*_LOST):
                self.stop.give_up(self._workers_store)

        telling = threading.Thread(target=tell, name="edl-give-up", daemon=True)
        telling.start()
        telling.join(_GIVE_UP_SECONDS)  # a store on a host that is cut off neither answers nor fails

    def close(self) -> None:
        """The run is over."""
        self._closed.set()
        self.dog.close()

    def _run(self) -> None:
        lost = False
        while not self._closed.wait(self._poll_seconds):
            self._end_with_the_agent()
            try:
                if not lost:
                    self.stop.poll(self.store)
                    self.dog.poll(self.store)
            except _LOST:
                lost = True
            if lost:
                self.stop.store_is_lost()
                self.dog.store_is_lost()

    def _end_with_the_agent(self) -> None:
        """torchrun's workers and mpirun's ranks would not notice that their agent or daemon was killed."""
        if self._agent is not None and os.getppid() != self._agent:
            self._agent = None
            os.kill(os.getpid(), signal.SIGTERM)


_current: _RunWatch | None = None


@contextlib.contextmanager
def watched(
    store: dist.Store, rank: int, size: int, name: str, run: RunConfig, in_step: bool = True
) -> Iterator[Watch]:
    """Watch over a run. store: of the worker. name: of the run, the same on all ranks, and no other run's.

    in_step: whether all ranks do the same at the same time.
    After an error the watch goes on, for `verdict`: the process ends soon.
    """
    global _current
    watch = _current = _RunWatch(store, rank, size, name, run, in_step)
    with first_asks(watch.stop.ask, run.grace_seconds):
        try:
            yield watch
        except BaseException:
            watch.give_up()
            raise
    watch.close()
    _current = None


def verdict(found: str, timed_out: bool) -> Verdict | None:
    """Who is to blame for a collective's failure, where a watch can tell. found: what failed.

    timed_out: it was not a peer that broke the connection, which may be the consequence of another's time-out.
    """
    if _current is None or not (timed_out or _current.dog.follows(_FOLLOW_SECONDS)):
        return None
    return _current.dog.after_timeout(found)


def _own_connection(store: dist.Store) -> dist.Store:
    """The same store through a connection that no waiting thread holds."""
    own: dist.Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub has forgotten it
    own.set_timeout(datetime.timedelta(seconds=_CONNECT_SECONDS))
    return own
