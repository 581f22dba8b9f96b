"""What rank 0 alone makes, on all ranks, over torch's store, which waits longer than a collective would."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from efficient_dl.errors import EdlError, TransportError

T = TypeVar("T")


def from_rank_0(rank: int, store: dist.Store, key: str, patience: float, make: Callable[[], T]) -> T:
    """What make() returns on rank 0, on all ranks; or raises its EdlError there, too.

    key: of the store, used once. patience: seconds that the others wait. Raises TransportError if rank 0 has failed, or
    says nothing.
    """
    if rank == 0:
        try:
            made: Any = make()
        except EdlError as error:
            made = error
        except BaseException:  # the others wait long
            failed = TransportError("rank 0 has ended while it measured the model", fix="see its log")
            store.set(key, pickle.dumps(failed))  # pyright: ignore[reportArgumentType]
            raise
        store.set(key, pickle.dumps(made))  # pyright: ignore[reportArgumentType]  # the stub knows str alone
    else:
        try:
            store.wait([key], timedelta(seconds=patience))
        except RuntimeError as error:  # torch's DistStoreError, a time-out or a store that is gone
            raise TransportError(
                "rank 0 has not told what it measured of the model",
                expected=f"within {patience:g} s",
                found=str(error).strip().splitlines()[0],
                fix="read the end of rank 0's log: it has stopped, is stuck or cannot be reached",
            ) from error
    outcome: Any = pickle.loads(store.get(key))  # of this run's own rank 0
    if isinstance(outcome, EdlError):
        raise outcome
    return outcome
