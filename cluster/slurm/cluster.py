"""Slurm on one machine: slurmctld, munged and a slurmd for each emulated host, all of them private to the cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from cluster import namespaces
from cluster.entering import hosts_text, missing_programs, on_host
from cluster.errors import EmulationError
from cluster.interruption import exit_on_signals
from cluster.network import EmulatedNetwork, interface_variables
from cluster.slurm import claims
from cluster.slurm.config import HEAD, Folder, SlurmOptions, configuration_text

_START_SECONDS = 60.0
_CALL_SECONDS = 60.0
_POLL_SECONDS = 0.05
_DESCRIPTION = "cluster.json"
_FOREIGN = ("SLURM", "SBATCH", "SALLOC", "SRUN", "SINFO", "SQUEUE", "SCANCEL", "MUNGE")
_PACKAGES = {
    "munged": "munge",
    "munge": "munge",
    **dict.fromkeys(("slurmctld", "slurmd", "sinfo", "srun", "scontrol"), "slurm-wlm"),
}


def missing_requirements(delay: bool = False) -> list[str]:
    """What this machine lacks to be a Slurm cluster, a line each with its remedy. delay: of the links, too."""
    missing = [
        f"the program {program}: apt-get install {package}"
        for program, package in _PACKAGES.items()
        if not shutil.which(program)
    ]
    if os.geteuid() != 0:
        missing.append("root: slurmd and munged of this cluster run as root")
    return [*missing, *missing_programs(), *namespaces.missing_requirements(delay)]


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that is up, as any process can use it.

    namespaces: of every host, the head's included, by name. daemons: those that this process has started.
    """

    folder: Folder
    namespaces: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str) -> RunningCluster:
        """The cluster that some process keeps up. Raises EmulationError if there is none of this name."""
        folder = claims.running_folder(name)
        try:
            found = json.loads((folder.path / _DESCRIPTION).read_text())
        except FileNotFoundError:
            raise EmulationError(f"the cluster {name!r} is just starting, or just ending") from None
        return cls(folder, found)

    @property
    def nodes(self) -> list[str]:
        """Names of the hosts that compute."""
        return [name for name in self.namespaces if name != HEAD]

    def environment(self) -> dict[str, str]:
        """This process's variables, without those of another Slurm, and with what leads programs to this one."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        threads = {} if "OMP_NUM_THREADS" in own else {"OMP_NUM_THREADS": "1"}
        return {**own, **threads, **interface_variables(), "SLURM_CONF": str(self.folder.configuration)}

    def on_host(self, host: str, command: Sequence[str]) -> list[str]:
        """The command line that runs the command on a host. Raises EmulationError if there is no such host."""
        if host not in self.namespaces:
            raise EmulationError(f"no host {host!r}; there are {', '.join(self.namespaces)}")
        return on_host(self.namespaces[host], host, self.folder.hosts_file, command)

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = _CALL_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head, as `sbatch job.sh` or `sinfo`, and returns what it printed.

        environment: more variables. Raises EmulationError if it takes longer than timeout_seconds.
        """
        try:
            return subprocess.run(
                self.on_host(HEAD, command),
                env={**self.environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EmulationError(
                f"`{' '.join(command)}` has not ended in {timeout_seconds} s: {error.output}"
            ) from None

    def states(self) -> dict[str, str]:
        """Slurm's short word for each node: idle, mix, alloc, comp, down, ... with a * if it does not answer."""
        shown = self.run(["sinfo", "--noheader", "--Node", "--format=%N %t"])
        return dict(line.split()[:2] for line in shown.stdout.splitlines() if line.strip())

    def kill_node(self, node: str) -> None:
        """Ends all processes of a node at once, its slurmd and jobs, as if its power had failed."""
        namespaces.kill_processes(self.namespaces[node])

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd, the first time or after `kill_node`."""
        self.folder.spool(node).mkdir(exist_ok=True, mode=0o700)
        self.start(node, f"slurmd.{node}", ["slurmd", "-D", "-N", node])

    def start(self, host: str, daemon: str, command: Sequence[str]) -> None:
        """Starts a daemon on a host; what it prints goes to its log."""
        if (last := self.daemons.get(daemon)) is not None:
            last.wait(_CALL_SECONDS)
        with self.folder.log(daemon).open("ab") as log:
            self.daemons[daemon] = subprocess.Popen(
                self.on_host(host, command),
                cwd="/",
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class SlurmCluster:
    """A Slurm cluster inside the `with` block; its value is the RunningCluster, and `network` its links.

    Every node is an emulated host behind a shaped link; another host is the head, where slurmctld and munged run and
    jobs are submitted. Leaving the block, by an exception or SIGTERM too, kills the jobs and removes everything. If the
    process is killed, its leftovers are removed when the next cluster starts, or by `python -m cluster.slurm down`.
    A Slurm or munge of the machine's own is neither used nor disturbed. Raises EmulationError.

    >>> with SlurmCluster(SlurmOptions(topology=Topology.uniform(2, "1gbit"))) as running:      # doctest: +SKIP
    ...     print(running.run(["srun", "-N", "2", "hostname"]).stdout)
    """

    def __init__(self, options: SlurmOptions | None = None) -> None:
        self.options = options or SlurmOptions()
        self.network = EmulatedNetwork(topology=self.options.with_head())
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunningCluster:
        if missing := missing_requirements(self.options.topology.has_delays):
            raise EmulationError(
                "this machine cannot be a Slurm cluster; it lacks\n  - " + "\n  - ".join(missing)
            )
        claims.sweep()
        with contextlib.ExitStack() as stack:
            stack.enter_context(exit_on_signals())
            folder = stack.enter_context(claims.claimed(self.options.name, self.network.prefix))
            stack.enter_context(self.network)
            running = self._start(folder, stack)
            self._stack = stack.pop_all()
        return running

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _start(self, folder: Folder, stack: contextlib.ExitStack) -> RunningCluster:
        hosts = list(enumerate(self.network.names))
        addresses = {name: self.network.address(host) for host, name in hosts}
        running = RunningCluster(folder, {name: self.network.namespace(host) for host, name in hosts})
        stack.callback(_reap, running, os.getpid())
        folder.hosts_file.write_text(hosts_text(addresses))
        folder.configuration.write_text(configuration_text(self.options, folder, addresses))
        (folder.path / "state").mkdir(mode=0o700)
        _write_key(folder)
        running.start(HEAD, "munged", _munged(folder))
        _wait(running, "munged", lambda: _answers(["munge", "-S", str(folder.munge_socket), "-n"]))
        running.start(HEAD, "slurmctld", ["slurmctld", "-D"])
        for node in running.nodes:
            running.start_node(node)
        wanted = dict.fromkeys(running.nodes, "idle")
        _wait(running, f"the nodes {', '.join(wanted)} to be idle", lambda: running.states() == wanted)
        (folder.path / _DESCRIPTION).write_text(json.dumps(dict(running.namespaces)))
        return running


def _munged(folder: Folder) -> list[str]:
    return [
        *("munged", "--foreground", f"--socket={folder.munge_socket}", f"--key-file={folder.munge_key}"),
        *(f"--pid-file={folder.path / 'munged.pid'}", f"--seed-file={folder.path / 'munged.seed'}"),
    ]


def _write_key(folder: Folder) -> None:
    with os.fdopen(os.open(folder.munge_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.urandom(128))


def _answers(command: list[str]) -> bool:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CALL_SECONDS, check=False
    )
    return done.returncode == 0


def _wait(running: RunningCluster, what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        ended = [name for name, process in running.daemons.items() if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            ends = f"; these have ended: {', '.join(ended)}" if ended else ""
            raise EmulationError(f"waited in vain for {what}{ends}\n{_logs(running.folder)}")
        time.sleep(_POLL_SECONDS)


def _logs(folder: Folder) -> str:
    """The last lines of every daemon's log."""
    tails = [
        (path.name, path.read_text(errors="replace").splitlines()[-8:]) for path in folder.path.glob("*.log")
    ]
    return "\n".join(f"  {name}: {line}" for name, lines in sorted(tails) for line in lines)


def _reap(running: RunningCluster, owner: int) -> None:
    """Ends all daemons and waits for those that this process has started, if it is the owner."""
    if os.getpid() != owner:
        return
    for namespace in running.namespaces.values():
        namespaces.kill_processes(namespace)
    for process in running.daemons.values():
        process.wait()
