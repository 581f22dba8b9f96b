"""A process's rank, world size and place on its node, from the variables of whichever launcher started it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from efficient_dl.comm.launchers import LAUNCHERS, SLURM, TORCHRUN, Environment, Launcher
from efficient_dl.errors import LaunchError

_OTHERS = tuple(one for one in LAUNCHERS if one is not TORCHRUN)
_ELASTIC = "TORCHELASTIC_RUN_ID"  # torchrun sets it, scripts do not
_UNSET = "unset RANK and WORLD_SIZE, or set both on every rank"


@dataclass(frozen=True)
class Place:
    """Where a process stands. local_rank, local_size: among those on its node; None where the launcher does not say."""

    launcher: Launcher
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def find_place(environment: Environment) -> Place | None:
    """This process's place; None if nobody started it as one of several, so that it may start workers itself.

    RANK and WORLD_SIZE (torchrun, a script) come first, then Open MPI's variables, PMI's (MPICH, Intel MPI, Cray), and
    Slurm's, with or without PMIx. A Slurm step of one task is nobody's peer: it may be an interactive shell.

    Raises LaunchError where variables are missing, are no numbers, or contradict each other.
    """
    if _ELASTIC in environment and TORCHRUN.rank in environment:
        return _read(TORCHRUN, environment)  # inside of srun or mpirun, which started its agents
    other = _place_among_others(environment)
    if TORCHRUN.rank not in environment:
        return _without_rank(environment, other)
    place = _read(TORCHRUN, environment)
    if other is None:
        return place
    _check_nesting(place, other)
    if place.local_rank is None and (other.rank, other.size) == (place.rank, place.size):
        return replace(place, local_rank=other.local_rank, local_size=other.local_size)
    return place


def _place_among_others(environment: Environment) -> Place | None:
    told = [
        _read(launcher, environment)
        for launcher in _OTHERS
        if launcher.rank in environment and launcher.size in environment
    ]
    if not told:
        _refuse_half_told(environment)
        return None
    first = told[0]
    for other in told[1:]:
        same = (first.rank, first.size) == (other.rank, other.size)
        if same and first.local_rank is None and other.local_rank is not None:
            first = other  # srun --mpi=pmi2: PMI's ranks, and Slurm's own variables say where on the node
    if first.launcher is not SLURM:
        return first
    _check_pmix(first, environment)
    return first if first.size > 1 else None


def _without_rank(environment: Environment, other: Place | None) -> Place | None:
    size = environment.get(TORCHRUN.size)
    if size is None:
        return other
    if other is None:
        raise _incomplete("RANK", "start by torchrun, or unset WORLD_SIZE to let edl start its own workers")
    if _number(environment, TORCHRUN.size, 1) != other.size:
        raise LaunchError(
            f"WORLD_SIZE contradicts {other.launcher.name}",
            expected=f"{other.size} ({other.launcher.size})",
            found=f"{size} (WORLD_SIZE)",
            fix="unset WORLD_SIZE",
        )
    return other


def _read(launcher: Launcher, environment: Environment) -> Place:
    if launcher.size not in environment:
        raise _incomplete(launcher.size, _UNSET)
    rank, size = _number(environment, launcher.rank), _number(environment, launcher.size, 1)
    known = launcher.local_rank in environment
    local_rank = _number(environment, launcher.local_rank) if known else None
    local_size = None
    if known and launcher.local_size is not None and launcher.local_size in environment:
        local_size = _number(environment, launcher.local_size, 1)
    elif known and launcher is SLURM and environment.get("SLURM_STEP_NUM_NODES") == "1":
        local_size = size
    for name, value, limit in (
        (launcher.rank, rank, size),
        (launcher.local_rank, local_rank or 0, local_size or size),
        (f"{launcher.local_size} - 1", (local_size or 1) - 1, size),
    ):
        if value >= limit:
            raise LaunchError(
                f"{launcher.name}'s variables contradict each other",
                expected=f"{name} below {limit}",
                found=str(value),
                fix="leave them as the launcher sets them on every rank",
            )
    return Place(launcher, rank, size, local_rank, local_size)


def _number(environment: Environment, name: str, low: int = 0) -> int:
    text = environment[name].strip()
    if not (text.isascii() and text.isdigit()) or int(text) < low:
        raise LaunchError(
            f"{name} is not a number as launchers set it",
            expected=f"a whole number, at least {low}",
            found=repr(environment[name]),
            fix="leave it as the launcher sets it, or unset it",
        )
    return int(text)


def _check_nesting(place: Place, other: Place) -> None:
    """A script may start ranks of its own under srun or mpirun: more of them, or the same by other names.

    What cannot be meant is a shell's RANK and WORLD_SIZE of another launch, which make every process the same rank.
    """
    same = place.rank == other.rank if place.size == other.size else place.size > other.size
    if other.size > 1 and not same:
        raise LaunchError(
            f"RANK and WORLD_SIZE contradict {other.launcher.name}",
            expected=f"rank {other.rank} of {other.size} ({other.launcher.rank}, {other.launcher.size})",
            found=f"rank {place.rank} of {place.size} (RANK, WORLD_SIZE)",
            fix="unset RANK and WORLD_SIZE: they may be left over from another launch",
        )


def _check_pmix(place: Place, environment: Environment) -> None:
    told = environment.get("PMIX_RANK", str(place.rank))
    if told != str(place.rank):
        raise LaunchError(
            "PMIx contradicts Slurm",
            expected=f"PMIX_RANK={place.rank}, as SLURM_PROCID",
            found=f"PMIX_RANK={told}",
            fix="start the ranks by srun --mpi=pmix or by Open MPI's mpirun, not by another PMIx launcher inside srun",
        )


def _refuse_half_told(environment: Environment) -> None:
    """Ranks that must not take themselves for the only one: each would start a run of its own."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        if name in environment and TORCHRUN.rank not in environment:
            raise LaunchError(
                f"{name} tells a rank, but no variable says of how many",
                expected="OMPI_COMM_WORLD_SIZE, PMI_SIZE or SLURM_STEP_NUM_TASKS",
                fix="start by mpirun, srun or torchrun; or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
            )


def _incomplete(name: str, fix: str) -> LaunchError:
    return LaunchError(
        "the launcher's environment is incomplete",
        expected="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        found=f"no {name}",
        fix=fix,
    )
