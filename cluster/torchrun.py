"""Torchrun jobs on emulated hosts, and what can happen to their agents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.faults import HurtJob, pids
from cluster.network import INTERFACE, EmulatedNetwork

_PORT = 29400  # torchrun's own


@dataclass(frozen=True)
class Launcher:
    """How torchrun is started: hosts, "2" or "1:2"; its restarts; whether agents share their store with workers."""

    hosts: str = "2"
    max_restarts: int = 3
    shares_store: bool = False
    join_seconds: int = 60
    port: int = _PORT


class TorchrunJob(HurtJob):
    """A torchrun agent on every host of a network, with one worker each.

    words: of a worker, after `python -m MODULE`. folder: for the agents' output.
    """

    def __init__(
        self,
        network: EmulatedNetwork,
        module: str,
        words: Sequence[str],
        folder: Path,
        launcher: Launcher | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(network, module, folder)
        self.launcher = launcher or Launcher()
        self._command = ["-m", module, *words]
        self._environment = dict(environment or {})
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._cut: set[int] = set()

    def begin(self) -> None:
        """An agent on every host."""
        for host in self.hosts():
            self.start(host)

    def end(self) -> None:
        """Kills all on the hosts."""
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

    def left(self) -> list[int]:
        """All processes that run on the hosts, but for agents that are cut off: torchrun's take minutes to notice."""
        excused = {self.agent(host) for host in self._cut}
        found = [pid for host in self.hosts() for pid in pids(self.network.namespace(host))]
        return [pid for pid in found if pid not in excused]

    def output(self) -> list[str]:
        """What each host's agent and worker have printed."""
        return [
            path.read_text(errors="replace") if (path := self._log(host)).exists() else ""
            for host in self.hosts()
        ]

    def wait(self, timeout_seconds: float, hosts: Sequence[int] | None = None) -> list[int]:
        """The agents' exit codes, 128 + n for signal n, by host. Raises EmulationError if one still runs then."""
        deadline = time.monotonic() + timeout_seconds
        codes: list[int] = []
        for host in self.hosts() if hosts is None else hosts:
            try:
                code = self._agents[host].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise EmulationError(f"host {host} still runs after {timeout_seconds:g} s") from None
            codes.append(128 - code if code < 0 else code)
        return codes

    def _log(self, host: int) -> Path:
        return self.folder / f"host{host}.log"

    # ---------------------------------------------------------------- faults
    def kill_agent(self, host: int) -> None:
        """SIGKILL for torchrun itself; its worker is left alone."""
        os.kill(self.agent(host), signal.SIGKILL)

    def cut(self, host: int) -> None:
        """See `HurtJob.cut`."""
        self._cut.add(host)
        super().cut(host)

    def restore(self, host: int) -> None:
        """See `HurtJob.restore`."""
        super().restore(host)
        self._cut.discard(host)
