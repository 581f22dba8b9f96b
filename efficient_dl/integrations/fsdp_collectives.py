"""All custom collectives of a sharded model, as its compressors say: installed together, and taken out together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from efficient_dl.comm import ChunkLayout, Compressor, OverlappedSharding, ShardedShadow
from efficient_dl.integrations.fsdp_comms import Backward, GradientReduceScatter, Lane
from efficient_dl.integrations.fsdp_gathers import WeightAllGather
from efficient_dl.integrations.fsdp_units import Unit

_EXIT_SECONDS = 2.0  # how long a process that ends without close() waits for its own threads


class FsdpCollectives:
    """What carries three compressors out; with groups and threads of its own, which all ranks make together.

    lanes: each unit's. compressors: of "gradients", "replicas" and "weights". owner: what the model keeps alive.
    begin, end: called around a backward pass that reduces, the latter with the seconds that it waited.
    sample: called with what each reduce-scatter is given. changes: whether the compressors may follow other plans
    later (`follow`); then groups are made that these could need.

    compressing: those of the compressors that encode, by name.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        lanes: Sequence[Lane],
        compressors: Mapping[str, Compressor],
        shadow: bool,
        owner: object,
        begin: Callable[[], None],
        end: Callable[[float], None],
        sample: Callable[[Tensor, ChunkLayout], None],
        changes: bool = False,
    ) -> None:
        self._units = list(units)
        self._lanes = list({id(lane): lane for lane in lanes}.values())
        self._compressors = dict(compressors)
        self._replicas = compressors["replicas"]
        self._is_shadow, self._changes = shadow, changes
        self._shardings: list[OverlappedSharding] = []
        self.compressing = self._which_compress()
        self._shadow = ShardedShadow(units[0].device) if self.compressing and shadow else None
        parts: list[Any] = [self._shadow] if self._shadow else []
        self._start_lanes()
        self._finalizer = weakref.finalize(self, _stop, self._shardings, parts, _EXIT_SECONDS)
        shardings = self._shardings

        def abort() -> None:
            for sharding in shardings:
                sharding.abort()

        self.backward = Backward(abort, begin, end)
        gradients, replicas, weights = (compressors[key] for key in ("gradients", "replicas", "weights"))
        self.scatters = [
            GradientReduceScatter(unit, gradients, replicas, lane, self.backward, self._shadow, sample)
            for unit, lane in zip(units, lanes, strict=True)
        ]
        self.gathers = [
            WeightAllGather(unit, weights, lane, self.backward, self._shadow)
            for unit, lane in zip(units, lanes, strict=True)
        ]
        for unit, gather, scatter in zip(units, self.gathers, self.scatters, strict=True):
            unit.install(gather, scatter, owner=owner, replaces_all_reduce=False)
        self.prepare()

    def follow(self) -> None:
        """Goes over to what the compressors' plans are by now, between two steps; all ranks call it together."""
        self.compressing = self._which_compress()
        self._start_lanes()
        for lane in self._lanes:
            lane.weights_may_have_changed = True  # whoever gathers now knows no sizes
        self.prepare()

    def prepare(self) -> None:
        """Before a step: says which units reduce between replicas themselves, also to drain what was kept there."""
        residuals = self._replicas.residuals
        replaces = not self._is_shadow and not self.backward.is_off
        compresses = self._replicas.plan.codec != "none"
        for unit in self._units:
            drains = residuals is not None and residuals.waits(unit.names)
            unit.replaces_all_reduce = replaces and unit.replicas is not None and (compresses or drains)

    def _which_compress(self) -> dict[str, Compressor]:
        if not any(control.world_size > 1 for lane in self._lanes for control in lane.controls):
            return {}
        return {key: one for key, one in self._compressors.items() if one.plan.codec != "none"}

    def _start_lanes(self) -> None:
        if self._shardings or not self.compressing or self._is_shadow:
            return
        reduces_replicas = self._changes or self._replicas.plan.codec != "none"
        for lane in self._lanes:
            if lane.control.world_size > 1:
                self._shardings.append(lane.start(reduces_replicas))

    def settle(self) -> None:
        """In the shadow: waits until all gathers have been counted."""
        for gather in self.gathers:
            gather.settle()

    def turn_off(self) -> None:
        """From now on torch's own collectives do everything."""
        self.backward.is_off = True
        self.prepare()

    def close(self, timeout: float) -> None:
        """Ends the threads, destroys the groups, and gives the model torch's own collectives back."""
        for unit in self._units:
            unit.release()
        if self._finalizer.detach():
            for sharding in self._shardings:
                sharding.close(timeout)
            if self._shadow is not None:
                self._shadow.stop(timeout)

    @property
    def counts(self) -> dict[str, int]:
        """What torch itself has sent beside what the meters tell."""
        return {
            "replica_wire_bytes": sum(scatter.replica_bytes for scatter in self.scatters),
            "native_gathers": sum(gather.native_gathers for gather in self.gathers),
            "native_gather_bytes": sum(gather.native_bytes for gather in self.gathers),
        }

    @counts.setter
    def counts(self, counts: Mapping[str, int]) -> None:
        for scatter, gather in zip(self.scatters, self.gathers, strict=True):
            scatter.replica_bytes = gather.native_gathers = gather.native_bytes = 0
        self.scatters[0].replica_bytes = counts["replica_wire_bytes"]
        self.gathers[0].native_gathers = counts["native_gathers"]
        self.gathers[0].native_bytes = counts["native_gather_bytes"]


def _stop(shardings: Sequence[Any], parts: Sequence[Any], timeout: float) -> None:
    for part in (*shardings, *parts):
        part.stop(timeout)
