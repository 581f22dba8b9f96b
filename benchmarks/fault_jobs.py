"""The jobs that `benchmarks.faults` hurts: the same command under torchrun, Slurm and mpirun, on emulated hosts."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

from benchmarks.fault_behaviour import MODULE, REPOSITORY
from cluster.faults import HurtJob
from cluster.mpi.hosts import MpiHosts
from cluster.mpi.job import MpirunJob, ranks_log
from cluster.mpi.programs import find_mpirun
from cluster.network import EmulatedNetwork
from cluster.scratch import scratch_folder
from cluster.slurm import SlurmCluster, SlurmOptions
from cluster.slurm.job import SlurmJob
from cluster.topology import Topology
from cluster.torchrun import Launcher, TorchrunJob
from efficient_dl.launching.job import Job
from efficient_dl.launching.mpirun import mpirun
from efficient_dl.launching.slurm import slurm

RATE = "1gbit"
_ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
MakesJob: TypeAlias = Callable[[Sequence[str], Path, Launcher], AbstractContextManager[HurtJob]]


@contextlib.contextmanager
def torchrun_job(words: Sequence[str], folder: Path, launcher: Launcher) -> Iterator[HurtJob]:
    """An agent and a worker on each of two hosts. words: of `benchmarks.faulty_rank`."""
    with (
        EmulatedNetwork(hosts=2, rate=RATE) as network,
        TorchrunJob(network, MODULE, words, folder, launcher, _ENVIRONMENT) as job,
    ):
        yield job


@contextlib.contextmanager
def slurm_job(words: Sequence[str], folder: Path, launcher: Launcher) -> Iterator[HurtJob]:
    """The batch script of `edl launch slurm` on two of three nodes: srun, torchrun, a worker on each."""
    description = Job(
        "slurm",
        workers=1,
        cpus=1,
        python=sys.executable,
        folder=str(folder),
        environment=_ENVIRONMENT,
        restarts=launcher.max_restarts,
        time="10",
        lead_seconds=20,
        command=("-m", MODULE, *words),
    )
    cluster = SlurmCluster(
        SlurmOptions(name=f"faults-{os.getpid()}", topology=Topology.uniform(3, RATE), node_timeout_seconds=8)
    )
    folder.mkdir(parents=True, exist_ok=True)
    with cluster as up, SlurmJob(cluster, up, slurm(description).text, MODULE, folder) as job:
        yield job


@contextlib.contextmanager
def mpirun_job(words: Sequence[str], folder: Path, launcher: Launcher) -> Iterator[HurtJob]:
    """The script of `edl launch mpirun`, a rank on each of two hosts. It restarts nothing: `launcher` is not used."""
    found = find_mpirun()
    separator = words.index("--")
    python = folder / "python"  # what the script takes for Python: a faulty rank
    faulty = shlex.join([sys.executable, "-m", MODULE, *words[:separator], "--"])
    log = shlex.quote(str(ranks_log(folder)))
    folder.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nshift 2 # -m efficient_dl.cli\nexec {faulty} "$@" >>{log} 2>&1\n')
    python.chmod(0o755)
    with EmulatedNetwork(hosts=2, rate=RATE) as network, scratch_folder(network.prefix) as files:
        description = Job(
            "mpirun",
            workers=1,
            hosts=tuple(network.names),
            python=str(python),
            folder=str(folder),
            environment=_ENVIRONMENT,
            mpi=found.kind,
            command=tuple(words[separator + 1 :]),
        )
        hosts = MpiHosts(network, files)
        with MpirunJob(network, hosts, found, mpirun(description).text, MODULE, folder) as job:
            yield job
