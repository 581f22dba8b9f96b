"""How far each rank of a pipelined run is: who is ahead waits for those behind for as long as these get on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch.distributed as dist

from efficient_dl.errors import TransportError

_LOOK_SECONDS = 0.02


class Pace:
    """One rank's view, by the store. A collective's time-out would count from the first rank's arrival; here it counts
    from the last step that any of those waited for has ended.

    name: of the run, the same on all ranks and no other run's. timeout: seconds without progress. alive: called
    whenever the others get on.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        name: str,
        timeout: float,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._rank, self._timeout, self._alive = store, rank, timeout, alive
        self._keys = [f"{name}/{one}" for one in range(size)]
        self._ended = f"{name}/ended"

    def tell(self, step: int) -> None:
        """This rank has ended so many steps. All ranks tell their first one before any of them waits."""
        self._store.set(self._keys[self._rank], str(step))

    def follow(self, step: int) -> None:
        """Return once another rank has ended so many steps. Raises TransportError as `meet` does."""
        self._wait(step, max)

    def meet(self, step: int) -> None:
        """Return once all other ranks have ended so many steps.

        Raises TransportError if none of them gets on for the time-out, or one has given up.
        """
        self._wait(step, min)

    def give_up(self) -> None:
        """This rank ends early: nobody should wait for it."""
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(self._ended, str(self._rank))

    def _wait(self, step: int, of: Callable[[list[int]], int]) -> None:
        others = [one for one in range(len(self._keys)) if one != self._rank]
        before: list[int] = []
        since = time.monotonic()
        while others:
            steps = [int(one) for one in self._store.multi_get([self._keys[other] for other in others])]
            if of(steps) >= step:
                return
            if steps != before:
                before, since = steps, time.monotonic()
                self._alive()
            if self._store.check([self._ended]):
                who = self._store.get(self._ended).decode()
                raise TransportError(
                    f"rank {who} has ended early", where=f"rank {self._rank}, after step {step}"
                )
            if time.monotonic() - since > self._timeout:
                least = min(steps)
                slow = ", ".join(str(other) for other, one in zip(others, steps, strict=True) if one == least)
                raise TransportError(
                    f"rank {slow} makes no progress",
                    expected=f"step {step} within {self._timeout:g} s of the one before",
                    found=f"step {least}",
                    where=f"rank {self._rank}",
                    fix="a longer run.timeout_seconds if a step takes so long; else see that rank's log",
                )
            time.sleep(_LOOK_SECONDS)
