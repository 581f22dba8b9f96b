"""Emulated hosts on which an mpirun starts its ranks: each has a name, and a stand-in for ssh that reaches it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from cluster.entering import hosts_text, missing_programs, on_host
from cluster.errors import EmulationError
from cluster.mpi.programs import Mpirun
from cluster.network import EmulatedNetwork, interface_variables
from cluster.scratch import scratch_folder
from cluster.topology import Topology

_TIMED_OUT = 124
_GRACE_SECONDS = 5.0
_PORT = 29500  # torchrun's

# Called as ssh is: options, the host, and words that the host's shell is to read.
_AGENT = """\
#!/bin/sh
while :; do
    case "$1" in
        -[lpoFi]) shift 2 ;;
        -*) shift ;;
        *) break ;;
    esac
done
host=$1
shift
case "$host" in
{cases}
    *) echo "no emulated host $host" >&2; exit 255 ;;
esac
"""


class MpiHosts:
    """An emulated network's hosts, as mpirun knows them.

    network: already up. folder: for the files that describe the hosts; must exist while ranks run.
    """

    def __init__(self, network: EmulatedNetwork, folder: Path) -> None:
        if missing := missing_programs():
            raise EmulationError(
                "this machine cannot give hosts a name; it lacks\n  - " + "\n  - ".join(missing)
            )
        self._network = network
        self._folder = folder
        self._names = network.names
        self._hosts_file = folder / "hosts"
        self._agent = folder / "agent"
        addresses = {name: network.address(host) for host, name in enumerate(self._names)}
        self._hosts_file.write_text(hosts_text(addresses))
        self._agent.write_text(self._agent_text())
        self._agent.chmod(0o755)

    def run(
        self,
        mpirun: Mpirun,
        num_ranks: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        capture: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs the command on num_ranks ranks, as evenly spread over the hosts as they can be, neighbours together.

        MASTER_ADDR and MASTER_PORT are set, for torch. capture: return what was printed, stderr with stdout, instead
        of printing it. The exit code is mpirun's, 124 after a time-out; afterwards nothing runs on the hosts.
        """
        process = self.start(
            mpirun,
            num_ranks,
            command,
            environment,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
        )
        output, timed_out = None, False
        with self._ended(process):
            try:
                output, _ = process.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
        if timed_out:
            output, _ = process.communicate()  # what it had printed by then
            return subprocess.CompletedProcess(command, _TIMED_OUT, output)
        code = process.returncode
        return subprocess.CompletedProcess(command, 128 - code if code < 0 else code, output)

    def start(
        self,
        mpirun: Mpirun,
        num_ranks: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[str]:
        """As `run`, without waiting: the process is mpirun's own, and ending its ranks is left to the caller."""
        if num_ranks < 1:
            raise EmulationError(f"no number of ranks: {num_ranks}; at least 1")
        front = mpirun.command(self._slots(num_ranks), self._folder / "hostfile", num_ranks)
        return self.start_around(mpirun, [*front, *command], environment, stdout, stderr)

    def start_around(
        self,
        mpirun: Mpirun,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[str]:
        """As `start`, for a command that calls mpirun and names the hosts itself."""
        return subprocess.Popen(
            self._on(0, command),
            env={**self._variables(), **mpirun.environment(self._agent), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    @contextlib.contextmanager
    def _ended(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """On leaving, by Ctrl-C too, ends mpirun, which ends its ranks, and then all that is left of them."""
        try:
            yield
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
            self._network.kill_all()
            process.wait()

    def _slots(self, num_ranks: int) -> list[tuple[str, int]]:
        each, more = divmod(num_ranks, len(self._names))
        counts = [each + (host < more) for host in range(len(self._names))]
        return [(name, count) for name, count in zip(self._names, counts, strict=True) if count]

    def _variables(self) -> dict[str, str]:
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        master = {"MASTER_ADDR": self._network.address(0), "MASTER_PORT": str(_PORT)}
        return {**os.environ, **threads, **interface_variables(), **master, "TMPDIR": str(self._folder)}

    def _on(self, host: int, command: Sequence[str]) -> list[str]:
        return on_host(self._network.namespace(host), self._names[host], self._hosts_file, command)

    def _agent_text(self) -> str:
        cases = [
            f"    {name} | {self._network.address(host)}) "
            f'exec {shlex.join(self._on(host, ["sh", "-c"]))} "$*" ;;'
            for host, name in enumerate(self._names)
        ]
        return _AGENT.format(cases="\n".join(cases))


@contextlib.contextmanager
def mpi_hosts(topology: Topology) -> Iterator[MpiHosts]:
    """Hosts for mpirun inside the block, behind links as EmulatedNetwork's. Raises EmulationError."""
    with EmulatedNetwork(topology=topology) as network, scratch_folder(network.prefix) as folder:
        yield MpiHosts(network, folder)
