"""Rounds over torch's store: every rank posts a value, rank 0 hears all of them and answers once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from efficient_dl import errors
from efficient_dl.coordinator.wording import counted
from efficient_dl.errors import ConfigError, EdlError, TransportError

FIRST_PAUSE_SECONDS = 0.001  # between looks at the store; doubled each time, up to the longest
LONGEST_PAUSE_SECONDS = 0.1
READ_SECONDS = 10.0  # for which rank 0, before it raises, waits for the others to read why


class StoreRounds:
    """Numbered rounds on a store of which only one object of this name exists on each rank.

    All ranks call `exchange` in the same order. Values are what JSON can hold; the store keeps those of the last round
    only. After a TransportError no further round is possible.

    timeout: seconds for which rank 0 waits for all values; the others wait twice as long for its answer, so that they
    learn from it who was missing.

    Raises ConfigError if this rank was on this store under this name before.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._name = name
        self._store = dist.PrefixStore(f"efficient_dl/{name}", store)
        self._round = 0
        self._answered = False  # the last round, by this rank, and not with an error
        joined = f"joined/{rank}"
        if self._guarded(lambda: self._store.check([joined])):
            raise ConfigError(
                f"rank {rank} already runs rounds named {name!r} on this store",
                fix="one coordinator for all, another name, or a new store after a restart",
            )
        self._guarded(lambda: self._store.set(joined, "1"))

    def exchange(self, value: Any, answer: Callable[[list[Any]], Any]) -> Any:
        """Returns, on every rank, what answer([value of rank 0, of rank 1, …]) returned on rank 0.

        An EdlError that `answer` raises is raised on every rank. Raises TransportError, on every rank that is alive,
        if values or the answer do not come in time.
        """
        number = self._round
        self._round += 1
        self._answered = False
        self._guarded(lambda: self._store.set(f"{number}/{self.rank}", json.dumps(value)))
        if self.rank == 0:
            return self._answer(number, answer)
        key = f"{number}/answer"
        if self._missing([key], 2 * self.timeout):
            raise TransportError(
                f"rank 0 did not answer rank {self.rank} within {2 * self.timeout:g} s",
                where=f"round {number} of {self._name} over torch's store",
                fix="see rank 0's own message; a longer timeout if it was only slow",
            )
        reply = json.loads(self._guarded(lambda: self._store.get(key)))
        self._guarded(lambda: self._store.set(f"{number}/read/{self.rank}", "1"))
        if "error" in reply:
            raise getattr(errors, reply["error"])(reply["problem"], **reply["details"])
        return reply["value"]

    def close(self) -> None:
        """Ends the rounds, at any time. Rank 0, with which the store may end, first lets the others read its answer."""
        if self.rank == 0 and self._answered:
            self._answered = False
            with suppress(TransportError):  # there is nobody left who could read
                self._wait_for_readers(self._round - 1, range(1, self.world_size), self.timeout)

    def _answer(self, number: int, answer: Callable[[list[Any]], Any]) -> Any:
        keys = [f"{number}/{rank}" for rank in range(self.world_size)]
        missing: list[str] = []
        try:
            missing = self._missing(keys, self.timeout)
            if missing:
                raise TransportError(
                    f"rank 0 heard nothing from {counted('rank', [keys.index(key) for key in missing])}"
                    f" within {self.timeout:g} s",
                    where=f"round {number} of {self._name} over torch's store",
                    fix="see those ranks' own messages; a longer timeout if they were only slow",
                )
            if number > 0:  # whoever posted in this round has read the answer of the one before
                self._forget(number - 1)
            value = answer([json.loads(self._guarded(lambda key=key: self._store.get(key))) for key in keys])
        except EdlError as error:
            self._reply(
                number, {"error": type(error).__name__, "problem": error.problem, "details": error.details}
            )
            present = [rank for rank in range(1, self.world_size) if keys[rank] not in missing]
            self._wait_for_readers(number, present, min(self.timeout, READ_SECONDS))
            raise
        except Exception as error:
            text = f"rank 0 failed: {type(error).__name__}: {error}"
            self._reply(
                number,
                {"error": "TransportError", "problem": text, "details": {"fix": "see rank 0's own message"}},
            )
            self._wait_for_readers(number, range(1, self.world_size), min(self.timeout, READ_SECONDS))
            raise
        self._reply(number, {"value": value})
        self._answered = True
        return value

    def _reply(self, number: int, reply: dict[str, Any]) -> None:
        self._guarded(lambda: self._store.set(f"{number}/answer", json.dumps(reply)))

    def _forget(self, number: int) -> None:
        keys = [
            key for rank in range(self.world_size) for key in (f"{number}/{rank}", f"{number}/read/{rank}")
        ]
        for key in [*keys, f"{number}/answer"]:
            self._guarded(lambda key=key: self._store.delete_key(key))

    def _wait_for_readers(self, number: int, ranks: Iterable[int], seconds: float) -> None:
        """For some seconds at most: a reader that has died in the meantime is no error of this rank."""
        self._missing([f"{number}/read/{rank}" for rank in ranks], seconds)

    def _missing(self, keys: list[str], timeout: float) -> list[str]:
        """The keys that are not there after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        pause = FIRST_PAUSE_SECONDS
        missing = keys
        while True:
            missing = [key for key in missing if not self._guarded(lambda key=key: self._store.check([key]))]
            if not missing or time.monotonic() >= deadline:
                return missing
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # torch's DistStoreError, DistNetworkError, and plain ones of FileStore
            raise TransportError(
                f"rank {self.rank} cannot reach torch's store",
                found=str(error).splitlines()[0],
                where=f"round {self._round} of {self._name}",
                fix="the process that hosts the store, rank 0 or the launcher, has probably ended; see its message",
            ) from error
