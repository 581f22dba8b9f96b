"""What can happen to a job on emulated hosts, whatever started it: killed and stopped ranks, dead links, slow hosts."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.network import EmulatedNetwork

_POLL_SECONDS = 0.02
_RANKS = (
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
)  # torchrun's first: it may run inside the others


class HurtJob(ABC):
    """A job on the hosts of a network, one rank on each, until the block ends; nothing of it is left afterwards.

    network: already up. module: what its ranks run, as `python -m`. folder: for what the job prints.
    """

    def __init__(self, network: EmulatedNetwork, module: str, folder: Path) -> None:
        self.network = network
        self._module = module
        self.folder = folder

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    @abstractmethod
    def begin(self) -> None:
        """Starts the job, also again after its end, by the same command."""

    @abstractmethod
    def end(self) -> None:
        """Kills what is left of it."""

    @abstractmethod
    def output(self) -> list[str]:
        """What the job has printed: one text, or one for each host."""

    @abstractmethod
    def wait(self, timeout_seconds: float, hosts: Sequence[int] | None = None) -> list[int]:
        """Waits for the job's end. Its exit codes: one, or one for each host; 128 + n for signal n.

        hosts: that are still there. Raises EmulationError if it runs longer.
        """

    @abstractmethod
    def left(self) -> list[int]:
        """Process numbers of all that still runs on the job's hosts."""

    # ---------------------------------------------------------------- processes
    def hosts(self) -> range:
        """Numbers of the hosts that can have ranks."""
        return range(self.network.hosts)

    def ranks(self, host: int) -> list[int]:
        """Process numbers of the job's ranks on a host."""
        return python_processes(self.network.namespace(host), self._module)

    def rank(self, rank: int) -> int:
        """The process number of a rank. Raises EmulationError if there is none, or more than one."""
        found = [pid for host in self.hosts() for pid in self.ranks(host) if rank_of(pid) == rank]
        if len(found) != 1:
            raise EmulationError(f"there are {len(found)} processes that are rank {rank}, instead of one")
        return found[0]

    # ---------------------------------------------------------------- faults
    def kill(self, rank: int) -> None:
        """SIGKILL, as the kernel sends it when memory is short."""
        os.kill(self.rank(rank), signal.SIGKILL)

    def stop(self, rank: int) -> None:
        """SIGSTOP: the process is there, its connections are open, and it does nothing."""
        os.kill(self.rank(rank), signal.SIGSTOP)

    def cut(self, host: int) -> None:
        """The host's link is dead until `restore`; nothing on it ends."""
        self.network.cut(host)

    def restore(self, host: int) -> None:
        """Undoes `cut`."""
        self.network.restore(host)


def pids(namespace: str) -> list[int]:
    """Of all processes on a host."""
    return [int(pid) for pid in namespaces.ip("netns", "pids", namespace).split()]


def python_processes(namespace: str, module: str) -> list[int]:
    """Numbers of the processes on a host that are `python -m MODULE`, and not what starts them."""
    found = []
    for pid in pids(namespace):
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if Path(words[0]).name.startswith("python") and words[words.index("-m") + 1] == module:
                found.append(pid)
    return found


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(one.split("=", 1) for one in text.split("\0") if "=" in one)


def rank_of(pid: int) -> int | None:
    """By the variables of its launcher; None where they tell none, or the process is gone."""
    try:
        variables = environment_of(pid)
    except OSError:
        return None
    return next((int(variables[name]) for name in _RANKS if name in variables), None)


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: Callable[[], str]) -> float:
    """The seconds until the condition holds. Raises EmulationError if it does not in time. what: for its message."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() > begin + timeout_seconds:
            raise EmulationError(f"waited {timeout_seconds:g} s in vain for {what()}")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - begin
