"""Which rank this process is, and where rank 0 waits, by the variables of torchrun, Slurm, Open MPI or MPICH."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import EmulationError

_CALL_SECONDS = 30.0
_LAUNCHERS = (  # the innermost first: torchrun inside of srun sets RANK, and all variables of Slurm are there too
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPICH", "PMI_RANK", "PMI_SIZE"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS"),
)
FIRST_PORT = 29500  # torchrun's


@dataclass(frozen=True)
class Place:
    """launcher: in words. head: the host of rank 0, as others reach it; "" if there is only one rank."""

    launcher: str
    rank: int
    world_size: int
    head: str


def find_place(environment: Mapping[str, str], head: str | None = None) -> Place:
    """This process's place. head: rank 0's host, where the variables do not say it. Raises EmulationError."""
    for launcher, rank, size in _LAUNCHERS:
        if rank in environment and size in environment:
            world_size = _number(environment, size)
            found = head or environment.get("MASTER_ADDR") or _first_node(environment)
            if world_size > 1 and not found:
                raise EmulationError(
                    f"{launcher} does not say on which host rank 0 is; pass --head HOST, or set MASTER_ADDR"
                )
            return Place(launcher, _number(environment, rank), world_size, found or "")
    return Place("no launcher", 0, 1, "")


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return ""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CALL_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EmulationError(
            f"scontrol cannot tell the first of {nodes}: {error}; pass --head HOST"
        ) from None
    return shown.stdout.split()[0]


def main_port() -> int:
    """Where the job's rank 0 will listen."""
    return _number(os.environ, "MASTER_PORT") if "MASTER_PORT" in os.environ else FIRST_PORT


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise EmulationError(f"{name}={environment[name]!r} is no number") from None
