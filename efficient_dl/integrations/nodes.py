"""What the user's `hierarchy=` means: which ranks share a node, agreed on by all of them."""

from __future__ import annotations

import logging
import os
import socket
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from efficient_dl.comm import ProcessGroupTransport, Topology
from efficient_dl.errors import ConfigError

Hierarchy: TypeAlias = DeviceMesh | int | str | None

_log = logging.getLogger(__name__)


class NodesWish:
    """A checked `hierarchy=`, before the ranks talk about it; raises ConfigError for what is impossible."""

    def __init__(self, hierarchy: Hierarchy, control: ProcessGroupTransport) -> None:
        self._control = control
        self._known: Topology | None = None
        self.discovers = hierarchy == "auto"
        if isinstance(hierarchy, DeviceMesh):
            self._known = Topology.of_mesh(hierarchy, dist.get_process_group_ranks(control.group))
        elif isinstance(hierarchy, int) and not isinstance(hierarchy, bool):
            self._known = Topology.of_size(control.world_size, hierarchy)
        elif hierarchy is not None and not self.discovers:
            raise ConfigError(
                f"unknown hierarchy {hierarchy!r}",
                expected='None, "auto", a DeviceMesh of nodes × ranks, or the number of ranks on each node',
                fix='use hierarchy="auto"',
            )

    def fact(self) -> str:
        """What must be equal on all ranks before they look for the nodes together."""
        return (
            "auto"
            if self.discovers
            else str([list(ranks) for ranks in self._known.nodes] if self._known else None)
        )

    def sent_share(self) -> float:
        """How many values a rank sends out of its node for each of the model's; as without a hierarchy, if unknown."""
        nodes, local = self._control.world_size, 1
        if self._known is not None and self._known.even:
            nodes, local = len(self._known.nodes), self._known.local_size
        return 2 * (nodes - 1) / (nodes * local)

    def topology(self) -> Topology | None:
        """The nodes, once all ranks have wished for the same; None without a wish. Logs why it stays flat."""
        found = self._known
        if self.discovers:
            found = Topology.discover(self._control, os.environ, socket.gethostname())
        if found is not None and (reason := found.flat_reason()):
            level = logging.INFO if found.even else logging.WARNING
            _log.log(level, "no hierarchy, all ranks reduce as equals: %s, by %s", reason, found.source)
        return found
