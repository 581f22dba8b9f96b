"""The compressed all-reduce: shards to their owners, one sum in rank order, one packet back to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from efficient_dl.comm.buffers import Rooms
from efficient_dl.comm.common_step import Leg
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout, Shard
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.transport import Transport

Op = Literal["avg", "sum"]


class Reduction:
    """One all-reduce of one flat bucket, in three steps, so that those of several buckets can overlap.

    x: 1-D, contiguous, layout.numel values of float32, bfloat16 or float16; replaced by the result.
    op: "avg" divides the sum by the world size, in float32, before it is rounded to x's dtype.
    divisors: float32, like x, equal on all ranks: values are divided by them before they are coded, and the result is
        multiplied by them.
    residual_units: of how many ranks x is the average already, as in a hierarchy; residuals are kept for one rank's.
    leg: of what x holds (see `Leg`).

    The shard's owner decodes what the others sent and adds it up in float32 in rank order; its own contribution
    takes part unquantized, which costs nothing and errs less. Every rank, the owner too, then applies what it decodes
    from the owner's packet, so that all ranks end bitwise equal. A lossless codec gives the identity codec's bits.
    A non-finite value reaches the result on all ranks.
    """

    def __init__(
        self,
        x: Tensor,
        layout: BucketLayout,
        compressor: Compressor,
        rank: int,
        op: Op = "avg",
        divisors: Tensor | None = None,
        residual_units: float = 1.0,
        leg: Leg = Leg.CONTRIBUTION,
    ) -> None:
        self.x = x
        self.layout = layout
        self.rank = rank
        self.op = op
        self._compressor = compressor
        self._divisors = divisors
        self._units = residual_units
        self._leg = leg
        self._tally = Tally(layout)
        self._shards = [x[shard.start : shard.stop] for shard in layout.shards]
        self._outgoing: list[Tensor] = []
        self._packet = x.new_empty(0, dtype=torch.uint8)
        self._rooms = Rooms(compressor.buffers)

    def encode(self) -> None:
        """Step 1: encodes the shards of the other ranks."""
        if self._divisors is not None:
            self.x.div_(self._divisors)
        self._outgoing = [
            self._packet
            if owner == self.rank
            else self._encode(self._shards[owner], shard, 1, self._units, self._leg)
            for owner, shard in enumerate(self.layout.shards)
        ]

    def exchange_and_reduce(self, transport: Transport) -> None:
        """Step 2: sends them, sums up the own shard and encodes the sum."""
        own, world_size = self.layout.shards[self.rank], len(self._shards)
        sizes = self._compressor.message_sizes([own] * world_size, self.x.dtype)
        work = transport.exchange(self._outgoing, sizes)
        incoming = self._tally.receive(work, sum(map(len, self._outgoing)))
        self._rooms.give_back()
        reduced = self._sum(incoming, transport.ranks).to(self.x.dtype)
        # Residuals are in units of contributions, of which an average has 1 / n.
        units = self._units * world_size if self.op == "avg" else self._units
        self._packet = self._encode(reduced, own, world_size - 1, units, Leg.RESULT)

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 3: distributes the sum, decodes everyone's into x, and adds the counts to the meter."""
        self.decode(self.gather(transport), transport.ranks)

    def gather(self, transport: Transport) -> list[Tensor]:
        """The first half of step 3: returns the packets of all shards' results, valid until the next transfer."""
        sizes = self._compressor.message_sizes(self.layout.shards, self.x.dtype)
        work = transport.gather(self._packet, sizes)
        return self._tally.receive(work, len(self._packet) * (len(self._shards) - 1))

    def decode(self, packets: list[Tensor], senders: Sequence[int]) -> None:
        """The second half of step 3, of the packets that `gather` returned. senders: their encoders, for errors."""
        for packet, part, shard, sender in zip(
            packets, self._shards, self.layout.shards, senders, strict=True
        ):
            self._compressor.decode(packet, part, shard, self._tally, leg=Leg.RESULT, sender=sender)
        if self._divisors is not None:
            self.x.mul_(self._divisors)
        self._rooms.give_back()
        self._compressor.meter.add(self._tally)

    def _encode(self, x: Tensor, shard: Shard, copies: int, residual_units: float, leg: Leg) -> Tensor:
        room = self._rooms.take(self._compressor.max_bytes(shard, x.dtype), x.device)
        return self._compressor.encode(x, room, shard, self._tally, copies, residual_units, leg)

    def _sum(self, incoming: list[Tensor], senders: Sequence[int]) -> Tensor:
        own, shard = self._shards[self.rank], self.layout.shards[self.rank]
        total = self._rooms.take(4 * own.numel(), own.device).view(torch.float32)
        self._compressor.sum(own, incoming, self.rank, shard, self._tally, total, senders, self._leg)
        return total.div_(len(incoming)) if self.op == "avg" else total


def all_reduce(
    x: Tensor, layout: BucketLayout, compressor: Compressor, transport: Transport, op: Op = "avg"
) -> None:
    """Replaces x by its sum or average over all ranks, and waits for it; see `Reduction`.

    With one rank there is nothing to send: x stays as it is, nothing is encoded or quantized.
    """
    if transport.world_size == 1:
        return
    reduction = Reduction(x, layout, compressor, transport.rank, op)
    reduction.encode()
    reduction.exchange_and_reduce(transport)
    reduction.gather_and_decode(transport)
