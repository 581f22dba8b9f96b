"""Runs a function on several ranks that are threads of this process, connected in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from efficient_dl.comm import LoopbackHub, Transport

T = TypeVar("T")


def on_ranks(world_size: int, function: Callable[[Transport], T], timeout: float = 30.0) -> list[T]:
    """Calls function(transport) on every rank at once; returns the values by rank, or raises what the first raised."""
    hub = LoopbackHub(world_size, timeout)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, hub.transport(rank)) for rank in range(world_size)]
        return [future.result() for future in futures]
