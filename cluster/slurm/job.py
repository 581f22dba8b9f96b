"""A batch job on an emulated Slurm cluster, and what can happen to it, its step and its nodes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import EmulationError
from cluster.faults import HurtJob, pids, python_processes
from cluster.slurm.cluster import RunningCluster, SlurmCluster
from cluster.slurm.config import HEAD

_ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
_AGENT = "torch.distributed.run"
_POLL_SECONDS = 0.2


class SlurmJob(HurtJob):
    """A job of a cluster that is up. script: for sbatch. All that the nodes run is taken for this job's.

    module: what its ranks run, as `python -m`. folder: where it is submitted, and its log lies.
    """

    def __init__(
        self, cluster: SlurmCluster, running: RunningCluster, script: str, module: str, folder: Path
    ) -> None:
        super().__init__(cluster.network, module, folder)
        self._running, self._script = running, script
        self.number = ""
        self._dead: set[int] = set()

    def begin(self) -> None:
        """Submits the script."""
        file = self.folder / "job.sbatch"
        file.write_text(self._script)
        words = ["sbatch", "--parsable", f"--chdir={self.folder}", f"--output={self._log}", str(file)]
        submitted = self._running.run(words)
        if submitted.returncode != 0:
            raise EmulationError(f"sbatch failed: {submitted.stderr}")
        self.number = submitted.stdout.strip()

    def end(self) -> None:
        """Cancels it; the cluster's end kills the rest."""
        self._running.run(["scancel", self.number])

    def hosts(self) -> range:
        """Of the nodes; the head comes after them."""
        return range(self.network.names.index(HEAD))

    def output(self) -> list[str]:
        """The batch script's and its step's."""
        return [self._log.read_text(errors="replace") if self._log.exists() else ""]

    def wait(self, timeout_seconds: float, hosts: Sequence[int] | None = None) -> list[int]:
        """See `HurtJob.wait`; the batch script's exit code."""
        deadline = time.monotonic() + timeout_seconds
        while (shown := self.shown()).get("JobState") not in _ENDED:
            if time.monotonic() > deadline:
                raise EmulationError(f"the job still is after {timeout_seconds:g} s: {shown}")
            time.sleep(_POLL_SECONDS)
        code, number = map(int, shown["ExitCode"].split(":"))
        return [128 + number if number else code]

    def left(self) -> list[int]:
        """All on the nodes but Slurm's own daemon, and what is cut off from it, until it hears of the end."""
        nodes = [self.network.namespace(host) for host in self.hosts()]
        return [pid for node in nodes for pid in pids(node) if _name(pid) != "slurmd"]

    def shown(self) -> dict[str, str]:
        """What Slurm says of the job: JobState, Restarts, BatchHost, NodeList, ExitCode, ..."""
        text = self._running.run(["scontrol", "--oneliner", "show", "job", self.number]).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    # ---------------------------------------------------------------- faults
    def kill_agent(self, host: int) -> None:
        """SIGKILL for torchrun on a host."""
        for pid in python_processes(self.network.namespace(host), _AGENT):
            os.kill(pid, signal.SIGKILL)

    def kill_step(self) -> None:
        """SIGKILL for the whole step, as Slurm sends it."""
        self._running.run(["scancel", "--signal=KILL", f"{self.number}.0"])

    def announce(self) -> None:
        """What Slurm does before the time limit: SIGUSR1 for the batch script."""
        self._running.run(["scancel", "--signal=USR1", "--batch", self.number])

    def displace(self) -> None:
        """A job of the urgent partition takes all nodes, for a moment; this one makes way."""
        words = ["srun", "--partition=urgent", "--exclusive", "-N", str(len(self.hosts())), "true"]
        urgent = self._running.run(words, timeout_seconds=120)
        if urgent.returncode != 0:
            raise EmulationError(f"the urgent job failed: {urgent.stderr}")

    def cancel(self) -> None:
        """scancel, as a user does it."""
        self._running.run(["scancel", self.number])

    def kill_node(self, host: int) -> None:
        """All processes of a node, its slurmd too, as if its power had failed."""
        self._running.kill_node(self.network.names[host])
        self._dead.add(host)

    def mend(self) -> None:
        """Nodes that were killed are started again."""
        for host in self._dead:
            self._running.start_node(self.network.names[host])
        self._dead.clear()

    @property
    def _log(self) -> Path:
        return self.folder / "job.log"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "slurmd"  # gone
