"""What carries a DistributedDataParallel model's buckets: an engine for each way of reducing, made when needed."""

from __future__ import annotations

from typing import NamedTuple

from efficient_dl.comm import (
    Compressor,
    HierarchicalReducer,
    Levels,
    ProcessGroupTransport,
    Topology,
    Transport,
)
from efficient_dl.integrations.ddp_buckets import BucketEngine, CompressedEngine, ShadowEngine
from efficient_dl.integrations.ddp_transport import divisible


class _Way(NamedTuple):
    """Whether sums are made inside of nodes first; and the size of groups, 0: none."""

    by_nodes: bool
    group_size: int


class Engines:
    """All engines of a model, with their threads and transports.

    levels: of the hierarchy between nodes, where it was made already.
    """

    def __init__(
        self,
        compressor: Compressor,
        control: ProcessGroupTransport,
        carrier: Transport,
        shadow: bool,
        levels: Levels | None = None,
    ) -> None:
        self._compressor, self._control, self._carrier, self._shadow = compressor, control, carrier, shadow
        self._made: dict[_Way, BucketEngine] = {}
        if levels is not None:
            self._made[_Way(True, 0)] = CompressedEngine(HierarchicalReducer(compressor, levels))

    def get(self, topology: Topology | None) -> BucketEngine:
        """The one that reduces over these nodes or groups, None: flat; all ranks ask for the same together."""
        if topology is not None and topology.flat_reason():
            topology = None
        in_groups = topology is not None and topology.groups
        way = _Way(
            topology is not None and not in_groups, topology.local_size if topology and in_groups else 0
        )
        if way not in self._made:
            self._made[way] = self._make(topology)
        return self._made[way]

    def _make(self, topology: Topology | None) -> BucketEngine:
        if self._shadow:
            return ShadowEngine(self._compressor, self._control)
        if topology is None:
            return CompressedEngine.flat(self._compressor, self._carrier)
        if topology.groups:
            return CompressedEngine.in_groups(self._compressor, divisible(self._carrier), topology)
        return CompressedEngine.by_nodes(self._compressor, self._control, topology)

    def abort(self) -> None:
        """Breaks the connections: the peers get a TransportError that names this rank now, not after a time-out."""
        for engine in self._made.values():
            engine.abort()

    def stop(self, timeout: float) -> None:
        """Ends the threads; a peer may keep them waiting for so many seconds, then the connections are broken."""
        for engine in self._made.values():
            engine.stop(timeout)

    def close(self, timeout: float) -> None:
        """The same, and destroys the groups that were made."""
        for engine in self._made.values():
            engine.close(timeout)
