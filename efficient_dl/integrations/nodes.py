"""What the user's `hierarchy=` means: which ranks share a node, agreed on by all of them."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from efficient_dl.comm import ProcessGroupTransport, Topology
from efficient_dl.comm.planner import PlannerOptions
from efficient_dl.comm.topology import group_sizes
from efficient_dl.errors import ConfigError

Hierarchy: TypeAlias = DeviceMesh | int | str | None

_GROUPS = re.compile(r"groups(?::([1-9]\d*))?")
_log = logging.getLogger(__name__)


def in_groups(hierarchy: Hierarchy) -> bool:
    """Whether `hierarchy=` asks for groups: "groups" or "groups:SIZE"."""
    return isinstance(hierarchy, str) and _GROUPS.fullmatch(hierarchy) is not None


def ways(hierarchy: Hierarchy, world_size: int) -> PlannerOptions:
    """Which reductions a planner may choose among: for "groups" only those, where ranks can be divided."""
    if isinstance(hierarchy, str) and (groups := _GROUPS.fullmatch(hierarchy)):
        possible = bool(group_sizes(world_size))
        return PlannerOptions(flat=not possible, groups=possible, group_size=int(groups[1] or 0) * possible)
    return PlannerOptions(hierarchy=hierarchy is not None, groups=hierarchy == "auto")


class NodesWish:
    """A checked `hierarchy=`, before the ranks talk about it; raises ConfigError for what is impossible.

    group_size: that was asked for; 0: none was.
    """

    def __init__(self, hierarchy: Hierarchy, control: ProcessGroupTransport) -> None:
        self._control = control
        self._known: Topology | None = None
        self.discovers = hierarchy == "auto"
        self.group_size = 0
        if isinstance(hierarchy, str) and (groups := _GROUPS.fullmatch(hierarchy)):
            self.group_size = int(groups[1] or 0)
            self._known = Topology.in_groups(control.world_size, self.group_size)
        elif isinstance(hierarchy, DeviceMesh):
            self._known = Topology.of_mesh(hierarchy, dist.get_process_group_ranks(control.group))
        elif isinstance(hierarchy, int) and not isinstance(hierarchy, bool):
            self._known = Topology.of_size(control.world_size, hierarchy)
        elif hierarchy is not None and not self.discovers:
            raise ConfigError(
                f"unknown hierarchy {hierarchy!r}",
                expected='None, "auto", "groups", "groups:SIZE", a DeviceMesh of nodes × ranks, or the number of '
                "ranks on each node",
                fix='use hierarchy="auto"',
            )

    def fact(self) -> str:
        """What must be equal on all ranks before they look for the nodes together."""
        if self.discovers or self._known is None:
            return "auto" if self.discovers else "None"
        nodes = str([list(ranks) for ranks in self._known.nodes])
        return f"groups {nodes}" if self._known.groups else nodes

    def sent_share(self) -> float:
        """How many values a rank sends out of its node for each of the model's; as without a hierarchy, if unknown.

        Groups send as many as ranks that reduce flat.
        """
        nodes, local = self._control.world_size, 1
        if self._known is not None and self._known.even and not self._known.groups:
            nodes, local = len(self._known.nodes), self._known.local_size
        return 2 * (nodes - 1) / (nodes * local)

    def topology(self) -> Topology | None:
        """The nodes, once all ranks have wished for the same; None without a wish. Logs why it stays flat."""
        found = self._known
        if self.discovers:
            found = Topology.discover(self._control, os.environ, socket.gethostname())
        if found is not None and (reason := found.flat_reason()):
            if not found.groups:
                level = logging.INFO if found.even else logging.WARNING
                _log.log(level, "no hierarchy, all ranks reduce as equals: %s, by %s", reason, found.source)
            elif self._control.rank == 0:
                _log.warning("no groups, all ranks reduce as equals: %s", reason)
        return found
