"""All ranks stop after the same step, once one of them is asked to.

No step waits for it: each rank counts the steps that it has begun. When a request shows up in the store, every rank
begins no further one and tells its count; the largest of them is the last step of all. Whoever is behind goes on to
it, so that a rank inside that step's collectives finds its peers there; no assumption about speeds is needed.
"""

from __future__ import annotations

import threading

import torch.distributed as dist

from efficient_dl.training.signals import Stopped

_ANSWER_SECONDS = 10.0  # each rank's thread answers at once, whatever its main thread does


class CommonStop:
    """One rank's view of one run.

    `may_begin` is called by the training loop, `ask` by whoever wants the end, `poll` several times a second by a
    thread with a connection of its own to the store. prefix: of its keys, new for every run.
    """

    def __init__(self, rank: int, size: int, prefix: str) -> None:
        self._rank, self._size, self._prefix = rank, size, prefix
        self._lock = threading.Lock()
        self._begun = 0
        self._is_frozen = False
        self._decided = threading.Event()
        self._last: int | None = None
        self._asked: int | None = None
        self._is_told = False
        self.number: int | None = None  # the signal that all ranks end by, once one has asked

    def ask(self, number: int) -> None:
        """End the run after a step, by this signal; from any thread."""
        self._asked = number

    def may_begin(self, step: int) -> bool:
        """Whether the step of this number, the last one's and one more, is to be trained; waits while ranks agree.

        Raises Stopped if one of them has ended meanwhile, and so agrees on nothing.
        """
        with self._lock:
            if not self._is_frozen:
                self._begun = step
                return True
        self._decided.wait(_ANSWER_SECONDS)
        if self._last is None:
            assert self.number is not None
            raise Stopped(self.number)  # a rank has ended meanwhile, and says why; or cannot be reached
        return step <= self._last

    def give_up(self, store: dist.Store) -> None:
        """This rank ends early: those that wait for its count must not."""
        store.set(f"{self._prefix}/ended", str(self._rank))

    def store_is_lost(self) -> None:
        """The ranks can agree on nothing any more: one that was asked to end, or waits for the others, ends."""
        if self._asked is not None or self._is_frozen:
            self.number = self.number or self._asked
            with self._lock:
                self._is_frozen = True
            self._decided.set()

    def poll(self, store: dist.Store) -> None:
        """Ask, freeze, tell and decide, as far as the others are."""
        if self._decided.is_set():
            return
        if self._asked is not None and not self._is_told:
            self._is_told = True
            store.compare_set(f"{self._prefix}/signal", "", str(self._asked))
        if not self._is_frozen:
            if not store.check([f"{self._prefix}/signal"]):
                return
            self.number = int(store.get(f"{self._prefix}/signal"))
            with self._lock:
                self._is_frozen = True
            store.set(f"{self._prefix}/begun/{self._rank}", str(self._begun))
            if store.add(f"{self._prefix}/told", 1) == self._size:
                counts = store.multi_get([f"{self._prefix}/begun/{rank}" for rank in range(self._size)])
                store.set(f"{self._prefix}/last", str(max(map(int, counts))))
        if store.check([f"{self._prefix}/last"]):
            self._last = int(store.get(f"{self._prefix}/last"))
            self._decided.set()
        elif store.check([f"{self._prefix}/ended"]):
            self._decided.set()
