"""One packet of a message in the making: exact or within a capacity, with a residual or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from efficient_dl.codec import Codec, PacketStats
from efficient_dl.comm.rates import coarser
from efficient_dl.comm.sections import Section

WITH_CAPACITY = "bits:"  # these codecs keep to a capacity
WITH_RESIDUAL = (WITH_CAPACITY, "grid:")  # and these add the residual and replace it while they encode
WITHOUT_HOST = "triton"  # the kernels that the host need not wait for


@dataclass(frozen=True)
class Packing:
    """The values of a section, and what their packet shall be.

    room: uint8; the packet becomes its front. stats: to be filled; None: not taken. capacity: the bytes of a bounded
    packet, which it takes whatever its content; None: as many as it needs.
    codec_of: a codec by its name. on_coarser: called each time that a packet is coded again with fewer bits.
    """

    values: Tensor
    room: Tensor
    section: Section
    stats: PacketStats | None
    capacity: int | None
    codec_of: Callable[[str], Codec]
    on_coarser: Callable[[Section], None]

    def write(self, codec: Codec, residual: Tensor | None = None) -> int:
        """Encodes the values, and adds the residual, which becomes what the packet leaves out; the packet's bytes."""
        if residual is None or codec.name.startswith(WITH_RESIDUAL):
            return self._write(codec, residual)
        wanted = residual.add_(self.values)
        length = replace(self, values=wanted.to(self.values.dtype)).write(codec)
        # Decoded into no memory of its own: new memory takes longer than the codec.
        codec.decode(self.room[:length], wanted.neg_(), accumulate=True, side=self.section.side)
        torch.sub(0.0, wanted, out=wanted)  # not neg_(), which would make zeros negative
        wanted.nan_to_num_(0.0, 0.0, 0.0)
        return length

    def _write(self, codec: Codec, residual: Tensor | None) -> int:
        """Rather than to lose blocks for want of room it takes fewer bits for all, where the host knows at once."""
        capacity, stats, room = self.capacity, self.stats, self.room
        if capacity is None:
            return int(codec.encode_into(self.values, room, self.section.side, stats, residual=residual))
        if not codec.name.startswith(WITH_CAPACITY):
            codec.encode_into(self.values, room, self.section.side, stats, residual=residual)
            return capacity
        if stats is None or codec.kernel_for(self.values.device) == WITHOUT_HOST:
            room[:capacity].zero_()  # what was in this memory before leaves with the packet
            self._write_bounded(codec, residual)
            return capacity
        before = None if residual is None else residual.clone()
        self._write_bounded(codec, residual)
        while stats.dropped_blocks and (again := coarser(codec.name)) is not None:
            self.on_coarser(self.section)
            if residual is not None and before is not None:
                residual.copy_(before)
            codec = self.codec_of(again)
            self._write_bounded(codec, residual)
        room[stats.packet_bytes : capacity].zero_()
        return capacity

    def _write_bounded(self, codec: Codec, residual: Tensor | None) -> None:
        codec.encode_into(
            self.values,
            self.room,
            self.section.side,
            self.stats,
            residual=residual,
            capacity=self.capacity,
        )
