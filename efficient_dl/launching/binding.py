"""Which cores a rank runs on, where ranks were given the same ones: whole cores, close to each other and to the GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from efficient_dl.errors import LaunchError

SYSTEM = Path("/sys/devices/system")


def share_of(
    cores: Sequence[int], position: int, count: int, places: Mapping[int, tuple[int, ...]]
) -> list[int]:
    """The cores of one of `count` ranks that have the same cores: disjoint shares, as equal as possible.

    places: what a core shares with others, from the outside in (NUMA node, package, physical core); those with equal
    beginnings stay together as far as possible. Raises LaunchError if there are fewer cores than ranks.
    """
    if count > len(cores):
        raise LaunchError(
            "there are fewer cores than workers that were given them",
            expected=f"at least {count}",
            found=str(len(cores)),
            fix="fewer workers on this machine, or --set run.bind=none",
        )
    ordered = sorted(cores, key=lambda core: (places.get(core, ()), core))
    first, last = position * len(cores) // count, (position + 1) * len(cores) // count
    return sorted(ordered[first:last])


def core_places(cores: Sequence[int], system: Path = SYSTEM) -> dict[int, tuple[int, ...]]:
    """(NUMA node, package, physical core) of each core, as Linux tells; what it does not tell counts as 0."""
    nodes = {core: number for number, held in numa_nodes(system).items() for core in held}
    return {
        core: (
            nodes.get(core, 0),
            _number(system / f"cpu/cpu{core}/topology/physical_package_id"),
            _number(system / f"cpu/cpu{core}/topology/core_id"),
        )
        for core in cores
    }


def numa_nodes(system: Path = SYSTEM) -> dict[int, set[int]]:
    """The cores of each NUMA node."""
    found: dict[int, set[int]] = {}
    for folder in system.glob("node/node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            found[int(folder.name[4:])] = set(cores_in((folder / "cpulist").read_text()))
    return found


def near_gpu(cores: Sequence[int], pci: str, devices: Path = Path("/sys/bus/pci/devices")) -> list[int]:
    """Those of the cores that are on the GPU's NUMA node; all, if none are or Linux does not tell the node.

    pci: the GPU's address, "0000:3b:00.0".
    """
    near = numa_nodes().get(_number(devices / pci / "numa_node", -1), set())
    return [core for core in cores if core in near] or list(cores)


def cores_in(text: str) -> list[int]:
    """Linux's "0-3,8" as numbers; raises ValueError."""
    ends = [one.split("-") for one in text.strip().split(",") if one]
    return [core for pair in ends for core in range(int(pair[0]), int(pair[-1]) + 1)]


def bind(cores: Sequence[int]) -> None:
    """Keep this thread, and those that it starts, on the cores."""
    os.sched_setaffinity(0, cores)


def _number(path: Path, default: int = 0) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return default
