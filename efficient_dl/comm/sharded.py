"""The compressed reduce-scatter: for parameters of which every rank keeps one part."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.comm.buffers import Rooms
from efficient_dl.comm.chunks import ChunkLayout
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import Shard
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.transport import Transport


class ShardedJob:
    """What both collectives need: a tally, and buffers to give back."""

    def __init__(self, layout: ChunkLayout, compressor: Compressor, rank: int) -> None:
        self.layout = layout
        self.rank = rank
        self._compressor = compressor
        self._tally = Tally(layout.bucket)
        self._rooms = Rooms(compressor.buffers)

    def _encode(self, values: Tensor, shard: Shard, copies: int) -> Tensor:
        room = self._rooms.take(self._compressor.max_bytes(shard, values.dtype), values.device)
        return self._compressor.encode(values, room, shard, self._tally, copies)

    def _finish(self) -> None:
        self._rooms.give_back()
        self._compressor.meter.add(self._tally)


class ReduceScatter(ShardedJob):
    """One reduce-scatter, in two steps, so that those of several buffers can overlap.

    x: 1-D, contiguous, one chunk a rank, float32, bfloat16 or float16; only read.
    out: the own chunk's sum over all ranks / divisor, of x's dtype; its padding becomes zero. Not a part of x.

    Contributions are decoded and added up in float32 in rank order, the own one unquantized; the result stays here, so
    that a value is rounded by a codec once. A lossless codec gives the identity codec's bits. A non-finite value
    reaches the owner's result.
    """

    def __init__(
        self,
        x: Tensor,
        out: Tensor,
        layout: ChunkLayout,
        compressor: Compressor,
        rank: int,
        divisor: float = 1.0,
    ) -> None:
        super().__init__(layout, compressor, rank)
        self._out = out
        self._divisor = divisor
        self._chunks = layout.chunks(x)
        self._outgoing: list[Tensor] = []

    def encode(self) -> None:
        """Step 1: encodes the chunks of the other ranks."""
        nothing = self._out.new_empty(0, dtype=torch.uint8)
        self._outgoing = [
            nothing
            if owner == self.rank
            else self._encode(self.layout.take(chunk, owner), self.layout.bucket.shards[owner], copies=1)
            for owner, chunk in enumerate(self._chunks)
        ]

    def exchange_and_reduce(self, transport: Transport) -> None:
        """Step 2: sends them, sums up the own chunk, and adds the counts to the meter."""
        own = self.layout.take(self._chunks[self.rank], self.rank)
        shard = self.layout.bucket.shards[self.rank]
        sizes = self._compressor.message_sizes([shard] * transport.world_size, own.dtype)
        work = transport.exchange(self._outgoing, sizes)
        incoming = self._tally.receive(work, sum(map(len, self._outgoing)))
        self._outgoing = []
        total = self._rooms.take(4 * own.numel(), own.device).view(torch.float32)
        self._compressor.sum(own, incoming, self.rank, shard, self._tally, total, transport.ranks)
        if self._divisor != 1.0:
            total.div_(self._divisor)
        result = self.layout.take(self._out, self.rank)
        result.copy_(total)
        self.layout.put(result, self._out, self.rank)
        self._chunks = []
        self._finish()


def reduce_scatter_chunks(
    x: Tensor,
    out: Tensor,
    layout: ChunkLayout,
    compressor: Compressor,
    transport: Transport,
    divisor: float = 1.0,
) -> None:
    """Makes out the sum over all ranks of the own chunk of x / divisor, and waits for it; see `ReduceScatter`.

    With one rank there is nothing to send: nothing is encoded or quantized.
    """
    if transport.world_size == 1:
        out.copy_(x if divisor == 1.0 else x.float() / divisor)
        return
    job = ReduceScatter(x, out, layout, compressor, transport.rank, divisor)
    job.encode()
    job.exchange_and_reduce(transport)


def sharded_native_tally(layout: ChunkLayout, rank: int, itemsize: int, gathers: bool) -> Tally:
    """What a ring's reduce-scatter, or all-gather, of such a buffer sends from one rank, calculated.

    Either way it is n − 1 chunks; rows of parameters count values only, the padding is in the totals.
    """
    tally = Tally(layout.bucket)
    others = [other for other in range(len(layout.pieces)) if other != rank]
    for other in others:
        shard = layout.bucket.shards[rank if gathers else other]
        if shard.numel:
            tally.sent(shard, shard.numel * itemsize, shard.numel * itemsize, copies=1)
        tally.announced((layout.chunk_numel - shard.numel) * itemsize)
    tally.totals.native_bytes = tally.totals.wire_bytes
    return tally
