"""Runs the command `edl` as the ranks of a launcher: forked processes, started in tenths of a second."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed.forks import CONTEXT


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


class EdlRanks:
    """The ranks of one `edl` command, each with its own arguments; or of another function of these, `main`."""

    def __init__(
        self,
        folder: Path,
        *arguments: Sequence[str],
        file_bytes: int | None = None,
        main: Callable[[list[str]], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ranks: list[BaseProcess] = []
        port = free_port()
        for rank, words in enumerate(arguments):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(arguments)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            streams = (folder / f"{rank}.out", folder / f"{rank}.err")
            process = CONTEXT.Process(target=_edl, args=(list(words), environment, streams, file_bytes, main))
            process.start()
            self._ranks.append(process)

    def signal(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self._ranks:
            assert process.pid
            os.kill(process.pid, number)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 90.0) -> None:
        """Wait until something has happened while all ranks run."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"nothing happened in {timeout} s: {self._text()}"
            assert all(process.is_alive() for process in self._ranks), self._text()
            time.sleep(0.02)

    def end(self, timeout: float = 120.0) -> list[Ended]:
        """Wait until all have ended; the test fails if one still runs after the time-out."""
        deadline = time.monotonic() + timeout
        for process in self._ranks:
            process.join(max(0.1, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self._ranks) if process.is_alive()]
        for process in self._ranks:
            if process.is_alive():
                process.kill()
                process.join()
        assert not stuck, f"ranks {stuck} still ran after {timeout} s: {self._text()}"
        return [
            Ended(process.exitcode or 0, self._read(rank, "out"), self._read(rank, "err"))
            for rank, process in enumerate(self._ranks)
        ]

    def _read(self, rank: int, stream: str) -> str:
        path = self._folder / f"{rank}.{stream}"
        return path.read_text() if path.exists() else ""

    def _text(self) -> str:
        return "".join(
            self._read(rank, stream) for rank in range(len(self._ranks)) for stream in ("out", "err")
        )


def edl(folder: Path, *arguments: str, ranks: int = 2, file_bytes: int | None = None) -> list[Ended]:
    """Run `edl` with the same arguments on every rank. file_bytes: the largest file that they may write."""
    return EdlRanks(folder, *[arguments] * ranks, file_bytes=file_bytes).end()


def _edl(
    words: list[str],
    environment: dict[str, str],
    streams: tuple[Path, Path],
    file_bytes: int | None,
    another: Callable[[list[str]], None] | None,
) -> None:
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if another is not None:
        return another(words)
    sys.argv = ["edl", *words]
    from efficient_dl.cli import main

    main()


_PORTS = range(
    20_000, 32_000
)  # below those that Linux gives to connections, which would take one before its rank
_WORKERS = 12
_turns = itertools.count(os.getpid())  # another run of the tests on this machine begins elsewhere


def free_port() -> int:
    """A TCP port that nothing listens on, and that no other worker of the tests is told."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    own = _PORTS[worker::_WORKERS]
    for _ in own:
        port = own[next(_turns) % len(own)]
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
