"""What a one-machine Slurm cluster is made of: its options, its folder, and its slurm.conf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import EmulationError
from cluster.topology import HostLink, Link, Topology

HEAD = "head"  # the host of slurmctld and munged, from which jobs are submitted
PARTITION, URGENT_PARTITION = "main", "urgent"
_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


@dataclass(frozen=True)
class SlurmOptions:
    """topology: the nodes, and their links.

    cpus: processors that each node claims to have. kill_wait_seconds: between a job's SIGTERM and its SIGKILL when it
    is cancelled or out of time. grace_seconds: the same for pre-emption. node_timeout_seconds: of silence, after which
    a node is DOWN; Slurm looks at intervals of a third of it, so that it takes up to two more.
    """

    name: str = "edl"
    topology: Topology = field(default_factory=lambda: Topology.uniform(2))
    cpus: int = 2
    kill_wait_seconds: int = 5
    grace_seconds: int = 5
    node_timeout_seconds: int = 10

    def __post_init__(self) -> None:
        check_name(self.name)
        for what, least in (("cpus", 1), ("node_timeout_seconds", 3)):
            if getattr(self, what) < least:
                raise EmulationError(f"no number of {what}: {getattr(self, what)}; at least {least}")
        if HEAD in (host.name for host in self.topology.hosts):
            raise EmulationError(f"no node can be called {HEAD}: the host of slurmctld is")

    def with_head(self) -> Topology:
        """The nodes, and as the last host the head, at the first node's site and on an unshaped link."""
        return self.topology.with_host(HostLink(HEAD, self.topology.hosts[0].site, Link("none")))


def check_name(name: str) -> None:
    """Raises EmulationError if a cluster cannot have this name."""
    if not _NAME.fullmatch(name):
        raise EmulationError(
            f"no name of a cluster: {name!r}; it has at most 31 lower-case letters, digits and dashes, a letter first"
        )


@dataclass(frozen=True)
class Folder:
    """Where a cluster keeps its files; path is short, because a socket's path has at most 107 bytes."""

    path: Path

    @property
    def configuration(self) -> Path:
        """slurm.conf: what SLURM_CONF names for every program of the cluster."""
        return self.path / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """Of the cluster's own munged; the system's, if any, is left alone."""
        return self.path / "munge.socket"

    @property
    def munge_key(self) -> Path:
        """128 random bytes, for this cluster only."""
        return self.path / "munge.key"

    @property
    def hosts_file(self) -> Path:
        """The /etc/hosts of all hosts."""
        return self.path / "hosts"

    def log(self, daemon: str) -> Path:
        """What a daemon prints."""
        return self.path / f"{daemon}.log"

    def spool(self, node: str) -> Path:
        """A node's SlurmdSpoolDir."""
        return self.path / f"spool.{node}"


def configuration_text(options: SlurmOptions, folder: Folder, addresses: Mapping[str, str]) -> str:
    """The slurm.conf. addresses: of all hosts by name, the head's included."""
    nodes = [name for name in addresses if name != HEAD]
    node_lines = [
        f"NodeName={name} NodeHostname={name} NodeAddr={addresses[name]} CPUs={options.cpus} RealMemory=1000 "
        "State=UNKNOWN"
        for name in nodes
    ]
    timeout = options.node_timeout_seconds
    settings = {
        "ClusterName": options.name,
        "SlurmctldHost": f"{HEAD}({addresses[HEAD]})",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A node whose processes died is trusted again once the job's credential has expired: 120 s by default.
        "AuthInfo": f"socket={folder.munge_socket},cred_expire=5",
        "StateSaveLocation": str(folder.path / "state"),
        "SlurmdSpoolDir": str(folder.spool("%n")),
        "SlurmctldPidFile": str(folder.path / "slurmctld.pid"),
        "SlurmdPidFile": str(folder.path / "slurmd.%n.pid"),
        "ProctrackType": "proctrack/linuxproc",  # no control groups: they would be the machine's
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",  # the nodes may claim more processors than the machine has
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0",
        "MpiDefault": "none",
        "ReturnToService": "2",
        "JobRequeue": "1",
        "KillWait": str(options.kill_wait_seconds),
        "SlurmdTimeout": str(timeout),
        "TCPTimeout": "2",
        "MessageTimeout": "5",
        "UnkillableStepTimeout": "15",
        "InactiveLimit": "0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        # Pre-emption is announced by the signal of sbatch --signal, where a job has one, instead of SIGTERM.
        "SlurmctldParameters": "preempt_send_user_signal",
        "TreeWidth": "65533",  # the controller talks to each node itself: one that is cut hides no other
    }
    partitions = [
        f"PartitionName={name} Nodes={','.join(nodes)} State=UP MaxTime=INFINITE PriorityTier={tier} {more}"
        for name, tier, more in (
            (PARTITION, 1, f"Default=YES GraceTime={options.grace_seconds}"),
            (URGENT_PARTITION, 10, "PreemptMode=OFF"),
        )
    ]
    lines = [*(f"{key}={value}" for key, value in settings.items()), *node_lines, *partitions]
    return "\n".join(lines) + "\n"
