"""FSDP2's custom all-gather of a unit's weights."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import (
    AllGather,
    ChunkLayout,
    Compressor,
    GatherSource,
    OwnPacket,
    ShadowGather,
    ShardedShadow,
    shadow_round,
    sharded_native_tally,
)
from efficient_dl.integrations.fsdp_comms import GRADIENT_DTYPES, Backward, Comm, FutureWork, Lane
from efficient_dl.integrations.fsdp_units import Unit

_log = logging.getLogger(__name__)
WEIGHT_DTYPES = (*GRADIENT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)


class WeightAllGather(Comm):
    """All-gathers the weights of one unit.

    compressor: with the plan "none" torch does it, and we count. shadow: torch does it, and the compressor only counts.

    What no codec takes is gathered natively, with a line in the log and a count: the dtypes of extensions, several
    dtypes in one unit, and the smaller group of reshard_after_forward=<int>, which is there to be fast.
    """

    def __init__(
        self,
        unit: Unit,
        compressor: Compressor,
        lane: Lane,
        backward: Backward,
        shadow: ShardedShadow | None,
    ) -> None:
        self._unit = unit
        self._compressor = compressor
        self._lane = lane
        self._backward = backward
        self._shadow = shadow
        self._shadowed: Future[Any] | None = None
        self._own_packet = OwnPacket()
        self._layout = unit.gather_layout()
        lane.sources.append(GatherSource(self._layout, self._own_packet, self._own_chunk))
        self.native_gathers = 0
        self.native_bytes = 0

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """See `AllGather.__call__` of torch.

        On a CPU it returns a Work whether asked to or not: torch waits for it before it uses the weights, so that what
        it prefetches in backward arrives beside the computation.
        """
        itemsize = input_tensor.element_size()
        if self._is_native:
            tally = sharded_native_tally(self._layout, group.rank(), itemsize, gathers=True)
            self._compressor.meter.add(tally)
            return native_all_gather(output_tensor, input_tensor, group, async_op)
        if reason := self._why_native(input_tensor, group):
            if not self.native_gathers:
                _log.warning("the weights of %r are gathered uncompressed: %s", self._unit.label, reason)
            self.native_gathers += 1
            self.native_bytes += (group.size() - 1) * input_tensor.numel() * itemsize
            return native_all_gather(output_tensor, input_tensor, group, async_op)
        if self._shadow is not None:
            self.settle()
            if self._lane.starts_round(self._compressor):
                shadow_round(self._lane.sources, self._compressor, group.size())
            size_bytes = 1 if self._lane.tells_sizes else 8
            watched = ShadowGather(
                input_tensor, self._layout, self._compressor, group.rank(), self._own_packet, size_bytes
            )
            self._shadowed = self._shadow.submit(watched)
            return native_all_gather(output_tensor, input_tensor, group, async_op)
        rank, numel = group.rank(), self._layout.chunk_numel
        own = output_tensor[rank * numel : (rank + 1) * numel]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        job = AllGather(output_tensor, self._layout, self._compressor, rank, self._own_packet)
        work = FutureWork(self._lane.gather(job, self._compressor), self._backward)
        if not async_op and output_tensor.device.type != "cpu":
            work.wait()
            return None
        return work

    def gathered(self) -> dict[str, Tensor] | None:
        """Every parameter's gathered values by name, as a forward pass would see them; None where torch gathers."""
        torch_gathers = self._is_native or self._shadow is not None or self._unit.world_size == 1
        own = None if torch_gathers else self._own_chunk()
        if own is None:
            return None
        buffer = own.new_empty(own.numel() * self._unit.world_size)
        work = self(buffer, own, self._unit.group, async_op=True)
        assert work is not None
        work.wait()
        return self._layout.parameters(buffer)

    def _own_chunk(self) -> Tensor | None:
        """What this rank contributes to the next gather, a copy; None where torch gathers."""
        own = self._unit.own_chunk()
        return None if own is None or self._why_native(own, self._unit.group) else own

    def settle(self) -> None:
        """In the shadow: waits until the last gather has been counted; there is at most one."""
        shadowed, self._shadowed = self._shadowed, None
        if shadowed is not None:
            self._backward.wait(shadowed)

    @property
    def layout(self) -> ChunkLayout:
        """How the unit's parameters lie in the buffers."""
        return self._layout

    @property
    def _is_native(self) -> bool:
        return self._compressor.plan.codec == "none" or self._backward.is_off

    def _why_native(self, own: Tensor, group: dist.ProcessGroup) -> str:
        if group.group_name != self._unit.group.group_name:
            return f"backward gathers within a smaller group, of {group.size()} ranks"
        if own.dtype not in WEIGHT_DTYPES:
            return f"no codec takes {own.dtype}"
        if own.numel() != self._layout.chunk_numel:
            return "an extension gathers something else than the shards"
        return ""


def native_all_gather(
    output: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """torch's own; under its new name since 2.13, where the old one warns."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(output, x, group=group, async_op=async_op)
