"""Where the ranks of a launch meet: the address and port of rank 0, from the launcher's variables or told by MPI."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from efficient_dl.comm.launchers import OPEN_MPI, SLURM, TORCHRUN, Environment
from efficient_dl.comm.mpi import open_store
from efficient_dl.errors import LaunchError, PackageMissing, TransportError
from efficient_dl.launching.ancestor import launching_process
from efficient_dl.launching.nodelist import first_node
from efficient_dl.launching.place import Place

LOOPBACK = "127.0.0.1"
_DEFAULT_PORT = 29500  # torch's
_FIRST_PORT, _NUM_PORTS = 15000, 15000  # below those that Linux hands out by itself, from 32768 on
_SCONTROL_SECONDS = 20


@dataclass(frozen=True)
class Meeting:
    """address, port: where rank 0 listens. source: the variables that say so, for messages."""

    address: str
    port: int
    source: str


def find_meeting(place: Place, environment: Environment) -> Meeting | None:
    """Where all ranks of this launch meet, the same on every rank; None if only MPI itself can tell.

    MASTER_ADDR and MASTER_PORT where they are set: torchrun and scripts need both. Slurm: the first node of the step,
    and a port from the job's and the step's number. MPI on one node: the loopback address, and a port from the job's
    name (PMIx) or from the process that started all ranks (PMI).
    Raises LaunchError where the variables are incomplete or no address.
    """
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    given = None if port is None else _port(port, place.size)
    if place.launcher is TORCHRUN:
        if address is None or given is None:
            raise LaunchError(
                "the launcher's environment is incomplete",
                expected="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
                found=f"no {'MASTER_ADDR' if address is None else 'MASTER_PORT'}",
                fix="start by torchrun, or unset RANK and WORLD_SIZE to let edl start its own workers",
            )
        return Meeting(address, given, "MASTER_ADDR, MASTER_PORT")
    if place.launcher is SLURM:
        return _of_slurm(place, address, given, environment)
    if address is not None:
        return Meeting(address, _DEFAULT_PORT if given is None else given, "MASTER_ADDR")
    if not _one_node(place):
        return None
    name = _job_name(place, environment) if given is None else ""
    return Meeting(LOOPBACK, _port_of(name) if given is None else given, f"one node; {name or 'MASTER_PORT'}")


def meet(place: Place, meeting: Meeting | None, timeout: timedelta) -> dist.TCPStore:
    """The store at which all ranks meet; rank 0 opens it, unless torchrun's agent has.

    timeout: to wait for rank 0, and of every later call. Raises TransportError if it cannot be reached or opened,
    LaunchError if MPI must tell where and cannot.
    """
    if meeting is None:
        return _told_by_mpi(place, timeout)
    host = f"[{meeting.address}]" if ":" in meeting.address else meeting.address
    url = f"tcp://{host}:{meeting.port}?rank={place.rank}&world_size={place.size}"
    try:
        store, _, _ = next(dist.rendezvous(url, timeout=timeout))
    except (dist.DistError, RuntimeError, ValueError) as error:
        taken = "EADDRINUSE" in str(error)
        raise TransportError(
            "rank 0 cannot listen" if taken else "the other workers cannot be reached",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            where=f"{meeting.address}:{meeting.port} ({meeting.source})",
            fix="set MASTER_PORT to a free port on all ranks"
            if taken
            else "check that every rank was started, and MASTER_ADDR and MASTER_PORT",
        ) from None
    assert isinstance(store, dist.TCPStore)  # of a tcp:// URL
    store.set_timeout(timeout)
    return store


def _one_node(place: Place) -> bool:
    return place.local_size == place.size


def _of_slurm(place: Place, address: str | None, port: int | None, environment: Environment) -> Meeting:
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID", "0")
    if job is None and port is None:
        raise LaunchError(
            "Slurm's environment is incomplete",
            expected="SLURM_JOB_ID",
            fix="start the ranks by srun, or set MASTER_PORT on all of them",
        )
    named = f"SLURM_JOB_ID={job}, SLURM_STEP_ID={step}"
    port = _port_of(named) if port is None else port
    if address is not None:
        return Meeting(address, port, f"MASTER_ADDR; {named}")
    if _one_node(place):
        return Meeting(LOOPBACK, port, f"one node; {named}")
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if name in environment:
            node = first_node(environment[name])
            return Meeting(_reachable(node), port, f"{name}={environment[name]}; {named}")
    raise LaunchError(
        "Slurm's environment does not name the nodes",
        expected="SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
        fix="start the ranks by srun, or set MASTER_ADDR to the node of rank 0",
    )


def _reachable(node: str) -> str:
    """The node's name, or where that is no name of a host, the address by which Slurm reaches it."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    program = shutil.which("scontrol")
    told = ""
    if program is not None:
        command = [program, "show", "node", node, "--oneliner"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS).stdout
        except subprocess.TimeoutExpired:
            told = ""
    addresses = [word.partition("=")[2] for word in told.split() if word.startswith("NodeAddr=")]
    if not addresses:
        raise LaunchError(
            f"the node {node} has no address",
            expected="a host name that resolves, or scontrol that tells NodeAddr",
            found="neither" if program else "no such host, and no scontrol",
            fix="set MASTER_ADDR to the address of rank 0's node on all ranks",
        )
    return addresses[0]


def _port(text: str, size: int) -> int:
    lowest = 0 if size == 1 else 1  # 0: any free one, which only a single rank need not tell the others
    if not (text.isascii() and text.isdigit()) or not lowest <= int(text) < 2**16:
        raise LaunchError(
            "MASTER_PORT is no port",
            expected=f"a number from {lowest} to 65535",
            found=repr(text),
            fix="unset it, or mend it",
        )
    return int(text)


def _port_of(name: str) -> int:
    """The same port for all ranks of a launch, and rarely that of another launch."""
    digest = hashlib.sha256(name.encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:8], "big") % _NUM_PORTS


def _job_name(place: Place, environment: Environment) -> str:
    """What only the ranks of this launch have in common, on one node."""
    if "PMIX_NAMESPACE" in environment:
        return f"PMIX_NAMESPACE={environment['PMIX_NAMESPACE']}"
    return launching_process(place.launcher.rank)


def _told_by_mpi(place: Place, timeout: timedelta) -> dist.TCPStore:
    try:
        store, rank, size = open_store(timeout=timeout.total_seconds())
    except PackageMissing as error:
        raise LaunchError(
            f"{place.launcher.name}'s variables do not say where rank 0 is",
            expected="MASTER_ADDR, or the package mpi4py to ask MPI",
            found=error.problem,
            fix="pip install mpi4py, or set MASTER_ADDR to rank 0's host for all ranks: mpirun "
            + ("-x MASTER_ADDR=HOST" if place.launcher is OPEN_MPI else "-genv MASTER_ADDR HOST"),
        ) from error
    if (rank, size) != (place.rank, place.size):
        raise LaunchError(
            "mpi4py belongs to another MPI than the launcher",
            expected=f"rank {place.rank} of {place.size} ({place.launcher.name})",
            found=f"rank {rank} of {size}",
            fix="set MPI4PY_LIBMPI to the launcher's libmpi.so, or MASTER_ADDR to rank 0's host for all ranks",
        )
    return store
