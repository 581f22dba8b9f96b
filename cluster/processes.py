"""One command on many emulated hosts: started together, its output told apart, ended together."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.interruption import uninterrupted

_POLL_SECONDS = 0.05
_TIMED_OUT = 124  # as timeout(1) has it


@dataclass(frozen=True)
class Host:
    """An emulated host. name: what its output is marked with. namespace: its name for `ip netns`."""

    name: str
    namespace: str
    address: str


@dataclass(frozen=True)
class RunResult:
    """How a command ended on all hosts.

    exit_code: that of the worker that failed first, 0 if none did, 124 after a time-out; 128 + n for signal n.
    exit_codes, output: of each worker in rank order, those that were ended included; output is stdout with stderr.
    seconds: from the first start to the last end.
    """

    exit_code: int
    exit_codes: tuple[int, ...]
    output: tuple[str, ...]
    seconds: float


def run_on_hosts(
    hosts: Sequence[Host],
    command: Sequence[str],
    *,
    port: int,
    workers_per_host: int,
    environment: Mapping[str, str],
    timeout_seconds: float | None,
    quiet: bool,
    grace_seconds: float,
) -> RunResult:
    """Runs the command `workers_per_host` times on every host; see `EmulatedNetwork.run`."""
    if not command or not shutil.which(command[0]):
        raise EmulationError(
            f"no command: {command[0] if command else 'nothing after --'} is not to be found"
        )
    started = time.monotonic()
    workers: list[_Worker] = []
    with _ended(workers, hosts, grace_seconds):
        for rank in range(len(hosts) * workers_per_host):
            host = hosts[rank // workers_per_host]
            variables = _torchrun_variables(rank, len(hosts), workers_per_host, hosts[0].address, port)
            name = host.name if workers_per_host == 1 else f"{host.name}.{rank % workers_per_host}"
            workers.append(_Worker(name, host, command, {**os.environ, **variables, **environment}, quiet))
        exit_code = _wait(workers, None if timeout_seconds is None else started + timeout_seconds)
    return RunResult(
        exit_code=exit_code,
        exit_codes=tuple(worker.wait() for worker in workers),
        output=tuple("".join(worker.lines) for worker in workers),
        seconds=time.monotonic() - started,
    )


class _Worker:
    """A process on a host, in a session of its own, and the threads that read what it prints."""

    def __init__(
        self, name: str, host: Host, command: Sequence[str], environment: Mapping[str, str], quiet: bool
    ) -> None:
        self.lines: list[str] = []
        self._quiet = quiet
        self._prefix = f"[{name}] "
        # `ip netns exec` becomes the command, so that this is the command's own process number.
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._readers = [
            threading.Thread(target=self._copy, args=(source, sink), daemon=True) for source, sink in streams
        ]
        for reader in self._readers:
            reader.start()

    def exit_code(self) -> int | None:
        """None while it runs."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def wait(self) -> int:
        """The exit code, once it has ended."""
        self._process.wait()
        return self.exit_code() or 0

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process and its group, unless it has ended."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def join_readers(self) -> None:
        """Waits until all that it printed has been read. A descendant may still hold the pipe: not for ever."""
        for reader in self._readers:
            reader.join(timeout=5.0)

    def _copy(self, source: IO[str], sink: IO[str]) -> None:
        for line in source:
            self.lines.append(line)
            if not self._quiet:
                # One write a line, so that the lines of several workers do not mix.
                with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the command goes on
                    sink.write(self._prefix + line.rstrip("\n") + "\n")
                    sink.flush()


def _wait(workers: Sequence[_Worker], deadline: float | None) -> int:
    """Waits for the first failure or the end of all; the exit code to report."""
    while True:
        codes = [worker.exit_code() for worker in workers]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        if deadline is not None and time.monotonic() > deadline:
            return _TIMED_OUT
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _ended(workers: Sequence[_Worker], hosts: Sequence[Host], grace_seconds: float) -> Iterator[None]:
    """On leaving, by an exception too, ends the workers and all that they have started on the hosts."""
    ending = signal.SIGTERM
    try:
        yield
    except KeyboardInterrupt:
        ending = signal.SIGINT  # Ctrl-C reaches only the emulator: the workers have sessions of their own
        raise
    finally:
        try:
            for worker in workers:
                worker.send(ending)
            deadline = time.monotonic() + grace_seconds
            while time.monotonic() < deadline and any(worker.exit_code() is None for worker in workers):
                time.sleep(_POLL_SECONDS)
        finally:  # a second signal cuts the grace short
            with uninterrupted():
                for host in hosts:
                    namespaces.kill_processes(host.namespace)
                for worker in workers:
                    worker.wait()
                    worker.join_readers()


def _torchrun_variables(
    rank: int, hosts: int, workers_per_host: int, address: str, port: int
) -> dict[str, str]:
    """What torchrun sets for a worker, as far as `init_process_group` and training scripts read it."""
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(hosts * workers_per_host),
        "LOCAL_RANK": str(rank % workers_per_host),
        "LOCAL_WORLD_SIZE": str(workers_per_host),
        "GROUP_RANK": str(rank // workers_per_host),
        "NODE_RANK": str(rank // workers_per_host),
        "GROUP_WORLD_SIZE": str(hosts),
    }
    # As torchrun: many workers on one machine's cores, unless the user says otherwise.
    return variables if "OMP_NUM_THREADS" in os.environ else {**variables, "OMP_NUM_THREADS": "1"}
