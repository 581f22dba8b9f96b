"""The compressed all-gather of parameters of which every rank keeps one part: encoded once, sent often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from efficient_dl.comm.chunks import ChunkLayout
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.sharded import ShardedJob
from efficient_dl.comm.transport import SIZE_BYTES, Transport

_FITS, _RESIZED = 0, 1  # the byte behind a message whose size was agreed on before


class OwnPacket:
    """The packet of the last own chunk, to be used again as long as the chunk's content is the same.

    A sharded model gathers the same weights in forward and again in backward; only an optimizer's step changes them.
    The content itself is the key (128 bits of xxh3), whatever changed it. On a GPU encoding is faster than hashing on
    the host: nothing is kept.

    sizes: what all ranks expect each other's packets to take, by rank, since a `SizeRound`; None before one.
    """

    def __init__(self) -> None:
        self.sizes: list[int] | None = None
        self._key: tuple[bytes, torch.dtype] | None = None
        self._message: Tensor | None = None

    def get(self, values: Tensor) -> Tensor | None:
        """The packet of these values, or None; then `keep` may follow."""
        if values.device.type != "cpu":
            return None
        content = values.view(torch.uint8).numpy().data if values.numel() else b""
        key = (xxhash.xxh3_128_digest(content), values.dtype)
        if key == self._key and self._message is not None:
            return self._message
        self._key, self._message = key, None
        return None

    def keep(self, message: Tensor) -> None:
        """Keeps a copy of the packet of the values that `get` was last asked for."""
        if message.device.type == "cpu":
            self._message = message.clone()


class GatherJob(Protocol):
    """What the threads of all-gathers work on."""

    def encode(self) -> None:
        """Step 1, on this rank alone."""
        ...

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 2, with the others."""
        ...


class AllGather(ShardedJob):
    """One all-gather, in two steps.

    out: 1-D, contiguous, one chunk a rank, of any dtype that the codec takes; the own chunk is what is sent. All
        chunks are replaced by what was decoded, on the owner too, so that all ranks have the same bits; paddings become
        zero. With an exact codec that is the native all-gather's result.
    own_packet: spares the encoding while the own chunk does not change, and the sizes that were agreed on before.

    Bounded packets travel without their sizes. Others whose sizes all ranks know do, too, but for one byte that says
    whether this one still fits: a rank whose weights have changed meanwhile sends as many bytes as were agreed on, and
    all ranks see that another gather, with sizes, has to follow.
    """

    def __init__(
        self, out: Tensor, layout: ChunkLayout, compressor: Compressor, rank: int, own_packet: OwnPacket
    ) -> None:
        super().__init__(layout, compressor, rank)
        self._chunks = layout.chunks(out)
        self._own_packet = own_packet
        self._message = out.new_empty(0, dtype=torch.uint8)

    def encode(self) -> None:
        """Step 1: encodes the own chunk, unless its packet is there."""
        values = self.layout.take(self._chunks[self.rank], self.rank)
        shard, copies = self.layout.bucket.shards[self.rank], len(self._chunks) - 1
        kept = self._own_packet.get(values)
        if kept is None:
            self._message = self._encode(values, shard, copies)
            self._own_packet.keep(self._message)
        else:
            self._message = kept
            raw_bytes = self._compressor.raw_bytes(shard, values.dtype)
            self._tally.sent(shard, len(self._message), raw_bytes, copies)

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 2: sends it to all, decodes everyone's, and adds the counts to the meter."""
        copies = len(self._chunks) - 1
        sizes = self._compressor.message_sizes(self.layout.bucket.shards, self._chunks[0].dtype)
        messages = None if sizes is not None else self._gather_agreed(transport)
        if messages is None:
            work = transport.gather(self._message, sizes)
            messages = self._tally.receive(work, len(self._message) * copies)
            if self._own_packet.sizes is not None:
                self._own_packet.sizes = [len(message) for message in messages]
        for source, message in enumerate(messages):
            if source == self.rank and self._compressor.exact:
                continue
            chunk = self._chunks[source]
            values = self.layout.take(chunk, source)
            shard, sender = self.layout.bucket.shards[source], transport.ranks[source]
            self._compressor.decode(message, values, shard, self._tally, sender=sender)
            self.layout.put(values, chunk, source)
        self._chunks = []
        self._finish()

    def _gather_agreed(self, transport: Transport) -> list[Tensor] | None:
        """All ranks' messages, sent without their sizes; None where they have to be sent with them."""
        sizes = self._own_packet.sizes
        if sizes is None:
            return None
        numel, fits = len(self._message), len(self._message) == sizes[self.rank]
        framed = self._rooms.take(sizes[self.rank] + 1, self._message.device)
        if fits:
            framed[:numel].copy_(self._message)
        else:
            framed.zero_()
        framed[-1] = _FITS if fits else _RESIZED
        copies = len(sizes) - 1
        work = transport.gather(framed, [size + 1 for size in sizes])
        received = self._tally.receive(work, numel * copies if fits else 0)
        if any(int(message[-1]) != _FITS for message in received):
            # What fitted was sent for nothing: it goes once more, and counts as an overhead the first time.
            self._tally.announced(numel * copies if fits else 0)
            return None
        return [message[:-1] for message in received]


class GatherSource:
    """One unit of a sharded model, of which this rank has one chunk.

    own_chunk: what the next gather will be given, a copy; None if it will not be compressed, on all ranks.
    """

    def __init__(
        self, layout: ChunkLayout, own_packet: OwnPacket, own_chunk: Callable[[], Tensor | None]
    ) -> None:
        self.layout, self.own_packet, self.own_chunk = layout, own_packet, own_chunk


class SizeRound:
    """Encodes all units' own chunks, and tells all ranks their packets' sizes in one message.

    Submitted before the first `AllGather` after weights may have changed, by all ranks, it spares each of the
    following gathers the message that announces a packet's size, and the time that takes. Packets themselves are not
    sent here; those of chunks that have not changed are not encoded again.
    """

    def __init__(self, sources: Sequence[GatherSource], compressor: Compressor, rank: int) -> None:
        self._sources = list(sources)
        self._compressor = compressor
        self._rank = rank
        self._sizes: list[int] = []

    def encode(self) -> None:
        """Step 1: encodes what has changed."""
        for source in self._sources:
            chunk = source.own_chunk()
            if chunk is None:
                self._sizes.append(-1)
            else:
                encoding = _Encoding(source, self._compressor, self._rank)
                self._sizes.append(encoding.size_of(chunk))

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 2: exchanges the sizes, of a length that all ranks know."""
        packet = torch.tensor(self._sizes, dtype=torch.int64).view(torch.uint8).to(transport.device)
        tally = Tally(self._sources[0].layout.bucket)
        work = transport.gather(packet, [SIZE_BYTES * len(self._sources)] * transport.world_size)
        received = [message.cpu().clone().view(torch.int64) for message in tally.receive(work, 0)]
        for position, source in enumerate(self._sources):
            sizes = [int(theirs[position]) for theirs in received]
            source.own_packet.sizes = None if min(sizes) < 0 else sizes
        self._compressor.meter.add(tally)


def shadow_round(sources: Sequence[GatherSource], compressor: Compressor, world_size: int) -> None:
    """Counts what a `SizeRound` would send."""
    tally = Tally(sources[0].layout.bucket)
    tally.announced(SIZE_BYTES * len(sources) * (world_size - 1))
    compressor.meter.add(tally)


class _Encoding(ShardedJob):
    """Encodes a chunk into its source's packet, and counts what that took; the gather counts what is sent."""

    def __init__(self, source: GatherSource, compressor: Compressor, rank: int) -> None:
        super().__init__(source.layout, compressor, rank)
        self._packet = source.own_packet

    def size_of(self, chunk: Tensor) -> int:
        """The bytes of the chunk's packet, which is there afterwards."""
        values = self.layout.take(chunk, self.rank)
        message = self._packet.get(values)
        if message is None:
            message = self._encode(values, self.layout.bucket.shards[self.rank], copies=0)
            self._packet.keep(message)
            size = len(message)
            self._finish()
            return size
        return len(message)


def all_gather_chunks(out: Tensor, layout: ChunkLayout, compressor: Compressor, transport: Transport) -> None:
    """Fills out with all ranks' chunks, of which it has the own one, and waits for it; see `AllGather`."""
    if transport.world_size == 1:
        return
    job = AllGather(out, layout, compressor, transport.rank, OwnPacket())
    job.encode()
    job.gather_and_decode(transport)
