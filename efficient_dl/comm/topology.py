"""Which ranks share a node: from a mesh, from what launchers tell, or from host names."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from efficient_dl.comm.handshake import gather_json
from efficient_dl.comm.launchers import LAUNCHERS, Environment
from efficient_dl.comm.transport import Transport
from efficient_dl.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """The ranks of a group by node. Ranks are numbered within the group, nodes in the order of their first ranks.

    nodes: each node's ranks, ascending; a rank's position among them is its local rank here.
    source: one phrase for logs and statistics: where this is known from.
    groups: these are no nodes but groups of ranks that have links of their own: what moves inside is compressed, too
        (see `GroupedReduction`).
    """

    nodes: tuple[tuple[int, ...], ...]
    source: str
    groups: bool = False

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return sum(map(len, self.nodes))

    @property
    def local_size(self) -> int:
        """How many ranks each node has; only where `even`."""
        return len(self.nodes[0])

    @property
    def even(self) -> bool:
        """Whether all nodes have equally many ranks, which a hierarchical reduction needs."""
        return len(set(map(len, self.nodes))) == 1

    def node_of(self, rank: int) -> tuple[int, ...]:
        """The ranks on this rank's node, itself included."""
        return next(ranks for ranks in self.nodes if rank in ranks)

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """The ranks with this rank's position on their nodes, one a node, itself included."""
        position = self.node_of(rank).index(rank)
        return tuple(ranks[position] for ranks in self.nodes)

    def flat_reason(self) -> str | None:
        """Why ranks had better reduce as equals, in one step: a sentence; None if a hierarchy is possible and saves."""
        if not self.even:
            sizes = ", ".join(str(len(ranks)) for ranks in self.nodes)
            return f"the nodes have different numbers of ranks ({sizes})"
        if self.local_size == 1:
            return "every group has one rank" if self.groups else "every node has one rank"
        if self.groups and len(self.nodes) == 1:
            return f"{self.world_size} ranks cannot be divided into groups"
        return None

    @property
    def reduced_by(self) -> list[list[int]] | dict[str, int] | None:
        """What a reduction over these nodes depends on: each node's ranks, or the groups, or None where it is flat."""
        if self.flat_reason():
            return None
        return {"group_size": self.local_size} if self.groups else [list(ranks) for ranks in self.nodes]

    def summary(self) -> dict[str, Any]:
        """For statistics: each node's or group's number of ranks, the source, and why ranks reduce flat, if they do."""
        return {
            "ranks_per_group" if self.groups else "ranks_per_node": [len(ranks) for ranks in self.nodes],
            "source": self.source,
            "flat_because": self.flat_reason(),
        }

    @staticmethod
    def of_size(world_size: int, local_size: int) -> Topology:
        """Nodes of local_size consecutive ranks. Raises ConfigError unless that divides the ranks evenly."""
        if local_size < 1 or world_size % local_size:
            raise ConfigError(
                f"{world_size} ranks cannot be divided into nodes of {local_size}",
                expected=f"a divisor of {world_size}",
                found=str(local_size),
                fix='give the number of ranks on each node, or hierarchy="auto"',
            )
        starts = range(0, world_size, local_size)
        nodes = tuple(tuple(range(start, start + local_size)) for start in starts)
        return Topology(nodes, f"{local_size} ranks a node, as asked for")

    @staticmethod
    def in_groups(world_size: int, group_size: int = 0) -> Topology:
        """Groups of group_size consecutive ranks; 0: as many as need the fewest messages (see `fewest_messages`).

        Raises ConfigError unless group_size divides the ranks evenly.
        """
        size = group_size or fewest_messages(world_size)
        if size < 1 or world_size % size:
            raise ConfigError(
                f"{world_size} ranks cannot be divided into groups of {size}",
                expected=f"a divisor of {world_size}",
                found=str(size),
                fix='hierarchy="groups" chooses one',
            )
        groups = Topology.of_size(world_size, size).nodes
        source = "as asked for" if group_size else "which need the fewest messages"
        return Topology(groups, f"groups of {size} ranks, {source}", groups=True)

    @staticmethod
    def of_mesh(mesh: DeviceMesh, ranks: Sequence[int]) -> Topology:
        """A row of the mesh is a node. ranks: the global ranks of the group, in its order.

        Raises ConfigError unless the mesh has two axes and holds exactly these ranks.
        """
        number = {rank: position for position, rank in enumerate(ranks)}
        held = [int(rank) for rank in mesh.mesh.flatten()]
        if mesh.mesh.dim() != 2 or sorted(held) != sorted(ranks):
            raise ConfigError(
                "the mesh does not describe the nodes of this process group",
                expected=f"two axes, nodes × ranks on a node, over the ranks {sorted(ranks)}",
                found=f"{mesh.mesh.dim()} axes over the ranks {sorted(held)}",
                fix='init_device_mesh("cpu", (nodes, ranks_per_node))',
            )
        nodes = [tuple(sorted(number[int(rank)] for rank in row)) for row in mesh.mesh]
        return Topology(tuple(sorted(nodes)), "a device mesh")

    @staticmethod
    def discover(transport: Transport, environment: Environment, host: str) -> Topology:
        """Asks all ranks where they run; every rank calls it, and all get the same. See `decide`."""
        return Topology.decide(gather_json(clues(environment, host), transport))

    @staticmethod
    def decide(everyone: Sequence[Mapping[str, Any]]) -> Topology:
        """Finds the nodes in all ranks' `clues`: by the first launcher that all ranks agree on, else by host name.

        A launcher counts if every rank has its variables, all ranks of a node name the same size, and their local ranks
        are 0 … size − 1, each once. Variables that a shell has left over from another launch do not add up so.
        """
        passed: list[str] = []
        for launcher in LAUNCHERS:
            told = [clue.get(launcher.name) for clue in everyone]
            if all(told):
                if nodes := _consistent([told_rank for told_rank in told if told_rank]):
                    return Topology(nodes, f"the variables of {launcher.name}")
                passed.append(launcher.name)
        reason = f" (the variables of {', '.join(passed)} do not add up)" if passed else ""
        return Topology(_grouped([clue["host"] for clue in everyone]), f"host names{reason}")


def group_sizes(world_size: int) -> list[int]:
    """The sizes of groups that world_size ranks can be divided into, ascending: neither 1 nor all."""
    return [size for size in range(2, world_size // 2 + 1) if world_size % size == 0]


def fewest_messages(world_size: int) -> int:
    """The group size g for which 2 (g + world_size / g − 2) messages a rank are fewest; the smaller one of two.

    world_size itself if that is prime or below 4: then there are no groups.
    """
    return min(group_sizes(world_size), key=lambda size: size + world_size // size, default=world_size)


def clues(environment: Environment, host: str) -> dict[str, Any]:
    """What one rank knows about its place: by launcher [node, local rank, ranks on the node], and its host's name."""
    found: dict[str, Any] = {"host": host}
    for launcher in LAUNCHERS:
        try:
            local_rank = int(environment[launcher.local_rank])
            local_size = int(environment[launcher.local_size]) if launcher.local_size else None
            first = int(environment[launcher.rank]) - local_rank
            node = first if launcher.node is None else int(environment[launcher.node])
        except (KeyError, ValueError):
            continue
        found[launcher.name] = [node, local_rank, local_size]
    return found


def _consistent(told: Sequence[Sequence[Any]]) -> tuple[tuple[int, ...], ...] | None:
    nodes = _grouped([node for node, _, _ in told])
    for ranks in nodes:
        if any(told[rank][2] not in (None, len(ranks)) for rank in ranks):
            return None
        if sorted(told[rank][1] for rank in ranks) != list(range(len(ranks))):
            return None
    return nodes


def _grouped(keys: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for rank, key in enumerate(keys):
        groups[key].append(rank)
    return tuple(map(tuple, groups.values()))


def machine() -> str:
    """What identifies this machine: its boot. Containers and emulated hosts on it share its cores."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def own_cores() -> list[int]:
    """Numbers of the cores on which this process may run."""
    try:
        return sorted(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        return list(range(os.cpu_count() or 1))
