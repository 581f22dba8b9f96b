"""How the ranks of a pre-flight check talk: over plain sockets to rank 0, because nothing else is known to work yet."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from cluster.errors import EmulationError

_PINGS = 5
_RETRY_SECONDS = 0.1
_HELLO_SECONDS = 5.0


class Line:
    """A connection that carries JSON values, a line each."""

    def __init__(self, connection: socket.socket, timeout_seconds: float) -> None:
        connection.settimeout(timeout_seconds)
        self._connection = connection
        self._reader = connection.makefile("r", encoding="utf-8", newline="\n")

    @property
    def own_address(self) -> str:
        """Of this end's interface."""
        return self._connection.getsockname()[0]

    def set_timeout(self, seconds: float) -> None:
        """How long to wait for the other end."""
        self._connection.settimeout(seconds)

    def send(self, value: Any) -> None:
        self._connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """The other end's next value. Raises OSError if it is gone or silent."""
        if not (text := self._reader.readline()):
            raise ConnectionError("the other end has gone")
        return json.loads(text)

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


class Hub:
    """Rank 0's end: a line to every rank that came. own: rank 0's values beside theirs."""

    def __init__(self, lines: dict[int, Line]) -> None:
        self.lines = lines

    def gather(self, own: Any) -> dict[int, Any]:
        """Every rank's next value, by rank; those that have gone or are silent are left out, from now on."""
        found = {0: own}
        for rank, line in list(self.lines.items()):
            try:
                found[rank] = line.receive()
            except OSError:
                self._lose(rank)
        return dict(sorted(found.items()))

    def tell(self, value: Any) -> None:
        """Sends all ranks the same."""
        for rank, line in list(self.lines.items()):
            try:
                line.send(value)
            except OSError:
                self._lose(rank)

    def clock_offsets(self) -> dict[int, tuple[float, float]]:
        """Seconds by which each rank's clock is ahead of ours, and how wrong that may be: half its fastest answer."""
        found = {}
        for rank, line in list(self.lines.items()):
            try:
                found[rank] = min((_ping(line) for _ in range(_PINGS)), key=lambda pair: pair[1])
            except OSError:
                self._lose(rank)
        return found

    def _lose(self, rank: int) -> None:
        self.lines.pop(rank).close()


def answer_pings(line: Line) -> None:
    """The other ranks' part in `Hub.clock_offsets`."""
    for _ in range(_PINGS):
        line.receive()
        line.send(time.time())


@contextlib.contextmanager
def hub(port: int, world_size: int, timeout_seconds: float) -> Iterator[Hub]:
    """Waits for the other ranks. Those that have not come in time are missing in `lines`."""
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + timeout_seconds
    try:
        server = socket.create_server(("", port), backlog=max(128, world_size))
    except OSError as error:
        raise EmulationError(f"rank 0 cannot listen at port {port}: {error}; choose another --port") from None
    try:
        with server:
            while len(lines) < world_size - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    break
                line = Line(connection, _HELLO_SECONDS)
                try:
                    lines[int(line.receive())] = line
                    line.set_timeout(timeout_seconds)
                except (OSError, ValueError, TypeError):  # a port scanner, not a rank
                    line.close()
        yield Hub(dict(sorted(lines.items())))
    finally:
        for line in lines.values():
            line.close()


@contextlib.contextmanager
def spoke(head: str, port: int, rank: int, timeout_seconds: float) -> Iterator[Line]:
    """Another rank's line to rank 0, which may start later. Raises EmulationError if it is not to be reached."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            connection = socket.create_connection(
                (head, port), timeout=max(deadline - time.monotonic(), 0.001)
            )
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise EmulationError(
                    f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {head}:{port} in "
                    f"{timeout_seconds} s: {error}; is the name right, the port open, the interface up?"
                ) from None
            time.sleep(_RETRY_SECONDS)
    line = Line(connection, 2 * timeout_seconds)  # rank 0 may wait for others as long
    try:
        line.send(rank)
        yield line
    finally:
        line.close()


def _ping(line: Line) -> tuple[float, float]:
    before = time.time()
    line.send("ping")
    there = float(line.receive())
    after = time.time()
    return there - (before + after) / 2, (after - before) / 2
