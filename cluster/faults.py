"""Torchrun jobs on emulated hosts, and what can happen to them: killed and stopped processes, dead hosts and links."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.network import INTERFACE, EmulatedNetwork

_PORT = 29400  # torchrun's own
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Launcher:
    """How torchrun is started: hosts, "2" or "1:2"; its restarts; whether agents share their store with workers."""

    hosts: str = "2"
    max_restarts: int = 3
    shares_store: bool = False
    join_seconds: int = 60
    port: int = _PORT


class TorchrunJob:
    """A torchrun agent on every host of a network, with one worker each, until the block ends.

    command: a worker's, after `python`: ["-m", "efficient_dl.cli", "train", ...]. folder: for the agents' output.
    Afterwards nothing of it is left on the hosts.
    """

    def __init__(
        self,
        network: EmulatedNetwork,
        command: Sequence[str],
        folder: Path,
        launcher: Launcher | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.network = network
        self.launcher = launcher or Launcher()
        self._command = list(command)
        self._folder = folder
        self._environment = dict(environment or {})
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._cut: set[int] = set()

    def __enter__(self) -> TorchrunJob:
        self._folder.mkdir(parents=True, exist_ok=True)
        for host in range(self.network.hosts):
            self.start(host)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for host, agent in self._agents.items():
            namespaces.kill_processes(self.network.namespace(host))
            agent.wait()

    # ---------------------------------------------------------------- processes
    def start(self, host: int) -> None:
        """Starts the host's agent, also again after its end."""
        launcher, address = self.launcher, self.network.address(host)
        torchrun = [
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", launcher.hosts, "--nproc-per-node", "1", "--max-restarts", str(launcher.max_restarts),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.network.address(0)}:{launcher.port}",
            "--rdzv-id", "faults", "--local-addr", address,
            # Names do not resolve on these hosts, by which torchrun would know where the rendezvous is to be kept.
            "--rdzv-conf",
            f"join_timeout={launcher.join_seconds},last_call_timeout=1,is_host={str(host == 0).lower()}",
        ]  # fmt: skip
        variables = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if launcher.shares_store else "1",
        }
        with self._log(host).open("ab") as log:
            self._agents[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.network.namespace(host), *torchrun, *self._command],
                env={**os.environ, **variables, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def agent(self, host: int) -> int:
        """The process number of the host's agent."""
        return self._agents[host].pid

    def worker(self, host: int) -> int:
        """The process number of the host's worker. Raises EmulationError if there is none."""
        found = children(self.agent(host))
        if len(found) != 1:
            raise EmulationError(f"host {host} has {len(found)} workers instead of one")
        return found[0]

    def left(self) -> list[int]:
        """All processes that run on the hosts, but for agents that are cut off: torchrun's take minutes to notice."""
        hosts = range(self.network.hosts)
        excused = {self.agent(host) for host in self._cut}
        return [
            pid
            for host in hosts
            for pid in map(int, namespaces.ip("netns", "pids", self.network.namespace(host)).split())
            if pid not in excused
        ]

    def output(self) -> list[str]:
        """What each host's agent and worker have printed."""
        return [
            path.read_text(errors="replace") if (path := self._log(host)).exists() else ""
            for host in range(self.network.hosts)
        ]

    def wait(self, timeout_seconds: float, hosts: Sequence[int] | None = None) -> list[int]:
        """The agents' exit codes, 128 + n for signal n, by host. Raises EmulationError if one still runs then."""
        deadline = time.monotonic() + timeout_seconds
        codes: list[int] = []
        for host in range(self.network.hosts) if hosts is None else hosts:
            try:
                code = self._agents[host].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise EmulationError(f"host {host} still runs after {timeout_seconds:g} s") from None
            codes.append(128 - code if code < 0 else code)
        return codes

    def _log(self, host: int) -> Path:
        return self._folder / f"host{host}.log"

    # ---------------------------------------------------------------- faults
    def kill_worker(self, host: int) -> None:
        """SIGKILL, as the kernel sends it when memory is short."""
        os.kill(self.worker(host), signal.SIGKILL)

    def stop_worker(self, host: int) -> None:
        """SIGSTOP: the process is there, its connections are open, and it does nothing."""
        os.kill(self.worker(host), signal.SIGSTOP)

    def kill_agent(self, host: int) -> None:
        """SIGKILL for torchrun itself; its worker is left alone."""
        os.kill(self.agent(host), signal.SIGKILL)

    def cut(self, host: int) -> None:
        """The host's link is dead until `restore`; nothing on it ends."""
        self._cut.add(host)
        self.network.cut(host)

    def restore(self, host: int) -> None:
        """Undoes `cut`."""
        self.network.restore(host)
        self._cut.discard(host)


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that have not ended."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: Callable[[], str]) -> float:
    """The seconds until the condition holds. Raises EmulationError if it does not in time. what: for its message."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() > begin + timeout_seconds:
            raise EmulationError(f"waited {timeout_seconds:g} s in vain for {what()}")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - begin
