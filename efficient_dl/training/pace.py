"""How far each rank of a pipelined run is: who is ahead waits for those behind for as long as these get on.

Where they do not, a rank that meets the others goes on to the collective, which finds broken connections at once and
has a time-out of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import torch.distributed as dist

from efficient_dl.errors import TransportError

_LOOK_SECONDS = 0.02


class Pace:
    """One rank's view, by the store. A collective's time-out would count from the first rank's arrival; here it begins
    when none of the others has ended a step for a while.

    name: of the run, the same on all ranks and no other run's. timeout: seconds without progress after which a rank
    that follows fails. patience: seconds without progress after which a rank that meets goes on; more than a step
    takes. alive: called whenever the others get on.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        name: str,
        timeout: float,
        patience: Callable[[], float],
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._rank, self._timeout, self._alive = store, rank, timeout, alive
        self._patience = patience
        self._keys = [f"{name}/{one}" for one in range(size)]
        self._ended = f"{name}/ended"

    def tell(self, step: int) -> None:
        """This rank has ended so many steps. All ranks tell their first one before any of them waits."""
        with self._reaching(step):
            self._store.set(self._keys[self._rank], str(step))

    def follow(self, step: int) -> None:
        """Return once another rank has ended so many steps.

        Raises TransportError if none of them gets on for the time-out, or one has given up.
        """
        with self._reaching(step):
            steps = self._wait(step, max, self._timeout)
        if steps:
            slow = ", ".join(str(other) for other, one in steps.items() if one == min(steps.values()))
            raise TransportError(
                f"rank {slow} makes no progress",
                expected=f"step {step} within {self._timeout:g} s of the one before",
                found=f"step {min(steps.values())}",
                where=f"rank {self._rank}",
                fix="a longer run.timeout_seconds if a step takes so long; else see that rank's log",
            )

    def meet(self, step: int) -> None:
        """Return once all other ranks have ended so many steps, or none of them has got on for the patience.

        Raises TransportError if one has given up.
        """
        with self._reaching(step):
            self._wait(step, min, self._patience())

    def give_up(self) -> None:
        """This rank ends early: nobody should wait for it."""
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(self._ended, str(self._rank))

    def _wait(self, step: int, of: Callable[[Iterable[int]], int], seconds: float) -> dict[int, int]:
        """How far the others are, if they have not got on for so many seconds; nothing if they are far enough."""
        others = [one for one in range(len(self._keys)) if one != self._rank]
        before: dict[int, int] = {}
        since = time.monotonic()
        while others:
            values = self._store.multi_get([self._keys[other] for other in others])
            steps = dict(zip(others, map(int, values), strict=True))
            if of(steps.values()) >= step:
                break
            if steps != before:
                before, since = steps, time.monotonic()
                self._alive()
            if self._store.check([self._ended]):
                who = self._store.get(self._ended).decode()
                raise TransportError(
                    f"rank {who} has ended early", where=f"rank {self._rank}, after step {step}"
                )
            if time.monotonic() - since > seconds:
                return steps
            time.sleep(_LOOK_SECONDS)
        return {}

    @contextlib.contextmanager
    def _reaching(self, step: int) -> Iterator[None]:
        try:
            yield
        except (dist.DistError, RuntimeError, OSError) as error:
            raise TransportError(
                "the store, which rank 0 or the launcher holds, cannot be reached",
                found=str(error).splitlines()[0],
                where=f"rank {self._rank}, step {step}",
                fix="it has ended, or its host cannot be reached; then --resume",
            ) from error
