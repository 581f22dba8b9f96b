"""After a lost connection: ranks tell each other whom they lost, so that all of them name the one that is gone.

A rank that waits for a dead one stops; whoever waits for that rank loses it next, and would blame the wrong one. So
every rank that fails writes whom it has lost into torch.distributed's store, breaks its other connections, which makes
the ranks behind it fail as well, and follows the reports: the rank that was lost and has reported nothing is the one.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch.distributed as dist

_POLL_SECONDS = 0.02
_GRACE_SECONDS = (
    0.5  # for the reports of ranks that fail in consequence; a broken connection is seen in milliseconds
)
_GRACE_SHARE = 0.1  # of a time-out: ranks began to wait at different times
_GRACE_LIMIT_SECONDS = 10.0
_numbers: WeakKeyDictionary[dist.ProcessGroup, itertools.count[int]] = WeakKeyDictionary()


class Losses:
    """What the ranks of one group, and of the groups made from it, report of each other. Ranks are global.

    aborts: break the connections of all transports that report here; filled by them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.aborts: list[Callable[[], None]] = []
        self._ranks = dist.get_process_group_ranks(group)
        # Equal on all ranks that make the same transports on a group, in the same order.
        number = next(_numbers.setdefault(group, itertools.count()))
        self._prefix = f"efficient_dl/losses/{group.group_name}/{number}/"
        self._lock = threading.Lock()
        self._found: int | None = None
        self.given_up = False  # this rank broke the connections itself, and lost nobody

    def culprit(self, rank: int, lost: int, timeout: float, timed_out: bool) -> int:
        """Reports that `rank`, this one, has lost `lost`; returns who is gone: the end of the chain of reports.

        It takes half a second, or after a time-out a tenth of that (10 s at most), unless all others report sooner. If
        the store cannot be reached, that is rank 0, which keeps it; with nothing to go by, `lost`.
        """
        with self._lock:  # one report a rank: its other threads fail in consequence
            if self._found is None and not self.given_up:
                grace = max(_GRACE_SECONDS, min(_GRACE_SHARE * timeout, _GRACE_LIMIT_SECONDS) * timed_out)
                self._found = self._ask(rank, lost, grace)
            return lost if self._found is None else self._found

    def _ask(self, rank: int, lost: int, grace: float) -> int:
        answers: list[int] = []
        asking = threading.Thread(
            target=self._report_and_follow, args=(rank, lost, grace, answers), name="edl-losses", daemon=True
        )
        asking.start()
        for abort in self.aborts:
            abort()
        asking.join(grace + 1.0)  # it hangs where the store cannot be reached without being closed
        return answers[0] if answers else lost

    def _report_and_follow(self, rank: int, lost: int, grace: float, answers: list[int]) -> None:
        reports = {rank: lost}
        deadline = time.monotonic() + grace
        answer = lost
        try:
            store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
            store.set(f"{self._prefix}{rank}", str(lost))
            num_reports = store.add(f"{self._prefix}number", 1)
            # The ranks wait for each other, above all so that rank 0 does not take the store away too soon.
            while time.monotonic() < deadline and num_reports < len(self._ranks) - 1:
                time.sleep(_POLL_SECONDS)
                num_reports = store.add(f"{self._prefix}number", 0)
            while (end := follow(reports, rank)) not in reports and store.check([f"{self._prefix}{end}"]):
                reports[end] = int(store.get(f"{self._prefix}{end}"))
            if end not in reports:
                answer = end
        except ValueError:
            pass  # torch.distributed was shut down meanwhile
        except RuntimeError:
            if 0 in self._ranks and rank != 0:
                answer = 0
        answers.append(answer)


def follow(reports: Mapping[int, int], rank: int) -> int:
    """From rank to whom it has lost, and so on, to the first that reports nothing, or that was passed already."""
    passed: set[int] = set()
    while rank in reports and rank not in passed:
        passed.add(rank)
        rank = reports[rank]
    return rank
