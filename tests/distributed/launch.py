"""Runs a function on several gloo ranks, each a process of its own, in tenths of a second."""

from __future__ import annotations

import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.forks import CONTEXT, start_server

PATIENCE_SECONDS = 200.0  # what a test of tenths of a second may take on a busy machine


@dataclass
class Outcome:
    """How one rank ended: with a value, with an exception, or with nothing but an exit code.

    seconds: from the start of all ranks to this one's report; -1.0 without one.
    """

    rank: int
    value: Any
    error: BaseException | None
    trace: str
    exit_code: int | None
    seconds: float


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = PATIENCE_SECONDS
) -> list[Any]:
    """Calls function(rank, *arguments) on every rank, in one process group; returns the values by rank."""
    outcomes = run_failing_ranks(function, world_size, *arguments, timeout=timeout)
    for outcome in outcomes:
        assert outcome.error is None, f"rank {outcome.rank} failed\n{outcome.trace}"
        assert outcome.exit_code == 0, f"rank {outcome.rank} ended with exit code {outcome.exit_code}"
    return [outcome.value for outcome in outcomes]


def run_failing_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = PATIENCE_SECONDS
) -> list[Outcome]:
    """The same for ranks that may fail or die; fails the test if one is still running after `timeout` seconds."""
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        ranks = [
            _Rank(function, rank, world_size, arguments, Path(folder) / "store") for rank in range(world_size)
        ]
        try:
            return [rank.outcome(start, timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.end()


class _Rank:
    def __init__(
        self,
        function: Callable[..., Any],
        rank: int,
        world_size: int,
        arguments: tuple[Any, ...],
        store: Path,
    ) -> None:
        self.rank = rank
        self.connection, child = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(
            target=_main, args=(function, rank, world_size, arguments, store, child)
        )
        self.process.start()
        child.close()

    def outcome(self, start: float, timeout: float) -> Outcome:
        value, error, trace, end = None, None, "", start - 1.0
        try:
            if not self.connection.poll(max(start + timeout - time.monotonic(), 0.0)):
                raise AssertionError(f"rank {self.rank} still runs after {timeout} s")
            value, error, trace, end = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            pass  # killed before it could say anything
        self.process.join(max(start + timeout - time.monotonic(), 1.0))
        assert self.process.exitcode is not None, f"rank {self.rank} does not end"
        return Outcome(self.rank, value, error, trace, self.process.exitcode, end - start)

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def _main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    arguments: tuple[Any, ...],
    store: Path,
    connection: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, which end their ranks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        report = (function(rank, *arguments), None, "", time.monotonic())
    except BaseException as error:
        report = (None, error, traceback.format_exc(), time.monotonic())
    # Not send(): torch would hand tensors over as file descriptors of this process, which is about to end.
    connection.send_bytes(pickle.dumps(report))
    connection.close()
