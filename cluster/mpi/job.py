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

# mpirun gives ranks a terminal, where `edl train` draws a bar; a file gets lines, at once.
_INTO_FILE = ("sh", "-c", 'exec "$@" >>"$0" 2>&1')
_DAEMONS = ("prted", "orted", "hydra_pmi_proxy")


class MpirunJob(HurtJob):
    """mpirun on the first host of a network, and a rank on each. command: of a rank, which runs `python -m MODULE`."""

    def __init__(
        self,
        network: EmulatedNetwork,
        hosts: MpiHosts,
        mpirun: Mpirun,
        command: Sequence[str],
        module: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(network, module, folder)
        self._hosts, self._mpirun = hosts, mpirun
        self._command = [*_INTO_FILE, str(folder / "ranks.log"), *command]
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Starts mpirun."""
        with self._log.open("ab") as log:
            self._process = self._hosts.start(
                self._mpirun, self.network.hosts, self._command, self._environment, stdout=log, stderr=log
            )

    def end(self) -> None:
        """Ends mpirun, and kills what is left on the hosts."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.network.kill_all()
        self._process.wait()

    def output(self) -> list[str]:
        """The ranks' together, and mpirun's."""
        files = (self.folder / "ranks.log", self._log)
        return [file.read_text(errors="replace") if file.exists() else "" for file in files]

    def wait(self, timeout_seconds: float, hosts: Sequence[int] | None = None) -> list[int]:
        """See `HurtJob.wait`; mpirun's exit code."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise EmulationError(f"mpirun still runs after {timeout_seconds:g} s") from None
        return [128 - code if code < 0 else code]

    def left(self) -> list[int]:
        """All on the hosts."""
        return [pid for host in self.hosts() for pid in pids(self.network.namespace(host))]

    # ---------------------------------------------------------------- faults
    def signal_mpirun(self, number: signal.Signals) -> None:
        """Sends mpirun itself a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill_daemon(self, host: int) -> None:
        """SIGKILL for what mpirun has started on another host to start ranks."""
        for pid in pids(self.network.namespace(host)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() in _DAEMONS:
                    os.kill(pid, signal.SIGKILL)

    @property
    def _log(self) -> Path:
        return self.folder / "mpirun.log"
