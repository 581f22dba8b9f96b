"""The variables by which launchers tell a process its place: the one table of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Environment: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Launcher:
    """The variables of a launcher: node's number, rank, world size, rank on the node, ranks on the node.

    node None: it tells no node numbers. Then a node's ranks must follow each other, and the first one's number is the
    node's; a mapping that scatters them is noticed, because the local numbers do not add up. local_size None: it tells
    none as one number.
    """

    name: str
    node: str | None
    rank: str
    size: str
    local_rank: str
    local_size: str | None


TORCHRUN = Launcher("torchrun", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = Launcher(
    "Open MPI",
    None,
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = Launcher(
    "MPICH", None, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
)  # Intel MPI, too
CRAY = Launcher("Cray MPI", None, "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
SLURM = Launcher("Slurm", "SLURM_NODEID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None)

# The first one whose variables are there counts: torchrun may run inside srun or mpirun, and mpirun starts its daemons
# by srun, whose variables are then the daemons'.
LAUNCHERS = (TORCHRUN, OPEN_MPI, MPICH, CRAY, SLURM)
