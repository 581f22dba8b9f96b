"""An MPI job on emulated hosts, and what can happen to its ranks, to mpirun and to mpirun's daemons."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.errors import EmulationError
from cluster.faults import HurtJob, pids
from cluster.mpi.hosts import MpiHosts
from cluster.mpi.programs import Mpirun
from cluster.network import EmulatedNetwork

_MPIRUNS = ("mpirun", "prterun", "orterun", "mpiexec.hydra")
_DAEMONS = ("prted", "orted", "hydra_pmi_proxy")


class MpirunJob(HurtJob):
    """A script around mpirun on the first host of a network, which starts a rank on each.

    script: bash's, which finds mpirun on its PATH. module: what ranks run as `python -m MODULE`. They print into
    `ranks_log(folder)`, because mpirun gives them a terminal, where `edl train` draws a bar.
    """

    def __init__(
        self,
        network: EmulatedNetwork,
        hosts: MpiHosts,
        mpirun: Mpirun,
        script: str,
        module: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(network, module, folder)
        self._hosts, self._mpirun, self._script = hosts, mpirun, script
        self._environment = {"PATH": f"{mpirun.path.parent}:{os.environ['PATH']}", **(environment or {})}
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Starts the script."""
        with self._log.open("ab") as log:
            self._process = self._hosts.start_around(
                self._mpirun, ["bash", "-c", self._script], self._environment, stdout=log, stderr=log
            )

    def end(self) -> None:
        """Ends the script, and kills what is left on the hosts."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.network.kill_all()
        self._process.wait()

    def output(self) -> list[str]:
        """The ranks' together, and the script's with mpirun's."""
        files = (ranks_log(self.folder), self._log)
        return [file.read_text(errors="replace") if file.exists() else "" for file in files]

    def wait(self, timeout_seconds: float, hosts: Sequence[int] | None = None) -> list[int]:
        """See `HurtJob.wait`; the script's exit code."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise EmulationError(
                f"the script still runs after {timeout_seconds:g} s; {self.output()}"
            ) from None
        return [128 - code if code < 0 else code]

    def left(self) -> list[int]:
        """All on the hosts."""
        return [pid for host in self.hosts() for pid in pids(self.network.namespace(host))]

    # ---------------------------------------------------------------- faults
    def signal_script(self, number: signal.Signals) -> None:
        """Sends the script a signal, as users and schedulers do."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill_mpirun(self) -> None:
        """SIGKILL for mpirun itself."""
        self._kill(0, _MPIRUNS)

    def kill_daemon(self, host: int) -> None:
        """SIGKILL for what mpirun has started on another host to start ranks."""
        self._kill(host, _DAEMONS)

    def _kill(self, host: int, programs: Sequence[str]) -> None:
        found = []
        for pid in pids(self.network.namespace(host)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() in programs:
                    os.kill(pid, signal.SIGKILL)
                    found.append(pid)
        if not found:
            raise EmulationError(f"none of {', '.join(programs)} runs on host {host}; {self.output()}")

    @property
    def _log(self) -> Path:
        return self.folder / "mpirun.log"


def ranks_log(folder: Path) -> Path:
    """Where the ranks of a job with this folder print."""
    return folder / "ranks.log"
