"""The all-reduce in groups: compressed inside of a group as well as between groups, with fewer messages."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.comm import sections as messages
from efficient_dl.comm.buffers import Rooms
from efficient_dl.comm.collectives import Op, Reduction
from efficient_dl.comm.common_step import Leg
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.hierarchy import Levels, cut_again
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.transport import Transport


class GroupedReduction:
    """One all-reduce of one flat bucket over N ranks in groups of g, each of them on its own link, in five steps.

    x, op, divisors: as in `Reduction`. layout: the bucket's parameters; it is cut anew, into g shards. levels: who this
    rank is, and in which group; its transports are passed to the steps.

    The rank at position p of a group decodes and sums up the group's p-th shard, in float32 in the order of the ranks,
    its own values unquantized; averages it over the group if op is "avg"; and rounds it to x's dtype. These N / g sums
    are reduced by a `Reduction` among the ranks at position p. The packets of its results are then passed on inside of
    the group as they are: every rank decodes the same bytes, and all end bitwise equal.

    A rank sends 2 (g + N / g − 2) messages instead of the 2 (N − 1) of a flat reduction, and as many values: in
    g + N / g − 2 packets instead of N − 1 on their way up, in N − 1 as before on their way down. A value is rounded
    three times, whatever the number of ranks: as a contribution, in its group's sum, and in the result; flat it is
    twice. With packets of relative error e the average errs by at most

        e · mean of the contributions' norms + e · mean of the groups' sums' norms + e · the norm of what they give

    A lossless codec gives the identity codec's bits; a non-finite value reaches all ranks. Every rank encodes each
    value once, as in a flat reduction, so that residuals of the one can go on in the other.
    """

    def __init__(
        self,
        x: Tensor,
        layout: BucketLayout,
        compressor: Compressor,
        levels: Levels,
        op: Op = "avg",
        divisors: Tensor | None = None,
    ) -> None:
        inside, across = levels.scatter, levels.exchange
        self.x = x
        self.layout = BucketLayout.of(layout.names, layout.numels, inside.world_size)
        self.op = op
        self.rank = inside.rank
        self._compressor = compressor
        self._divisors = divisors
        self._shards = [x[shard.start : shard.stop] for shard in self.layout.shards]
        self._cuts = [cut_again(shard, across.world_size) for shard in self.layout.shards]
        self._tally, self._spread_tally = Tally(self.layout), Tally(self._cuts[inside.rank])
        self._outgoing: list[Tensor] = []
        self._rooms = Rooms(compressor.buffers)
        self._bundle_rooms = Rooms(compressor.buffers)
        self._bundle = x.new_empty(0, dtype=torch.uint8)
        self._packet_bytes = 0
        units = float(inside.world_size) if op == "avg" else 1.0
        self._across = Reduction(
            self._shards[inside.rank],
            self._cuts[inside.rank],
            compressor,
            across.rank,
            op,
            residual_units=units,
            leg=Leg.GROUP,
        )

    def encode(self) -> None:
        """Step 1: encodes the shards of the other ranks of the group."""
        if self._divisors is not None:
            self.x.div_(self._divisors)
        for owner, (shard, part) in enumerate(zip(self.layout.shards, self._shards, strict=True)):
            if owner == self.rank:
                self._outgoing.append(self._bundle)
                continue
            room = self._rooms.take(self._compressor.max_bytes(shard, part.dtype), part.device)
            self._outgoing.append(self._compressor.encode(part, room, shard, self._tally, copies=1))

    def scatter_and_reduce(self, transport: Transport) -> None:
        """Step 2: sends them, puts the group's sum of the own shard into x, encodes it for the other groups."""
        own, shard = self._shards[self.rank], self.layout.shards[self.rank]
        sizes = self._compressor.message_sizes([shard] * transport.world_size, self.x.dtype)
        work = transport.exchange(self._outgoing, sizes)
        incoming = self._tally.receive(work, sum(map(len, self._outgoing)))
        self._outgoing = []
        total = self._rooms.take(4 * own.numel(), own.device).view(torch.float32)
        self._compressor.sum(own, incoming, self.rank, shard, self._tally, total, transport.ranks)
        own.copy_(total.div_(len(incoming)) if self.op == "avg" else total)
        self._rooms.give_back()
        self._across.encode()

    def exchange_and_reduce(self, transport: Transport) -> None:
        """Step 3: sends that to them, sums up the own part of the shard, encodes the sum."""
        self._across.exchange_and_reduce(transport)

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 4: distributes it to the other groups, copies all packets of the shard, and decodes them."""
        packets = self._across.gather(transport)
        self._keep(packets)
        self._across.decode(packets, transport.ranks)

    def spread(self, transport: Transport) -> None:
        """Step 5: passes the packets on inside of the group, decodes those of the other shards, adds to the meter."""
        copies = transport.world_size - 1
        work = transport.gather(self._bundle, self._bundle_sizes())
        received = self._spread_tally.receive(work, self._packet_bytes * copies)
        for source, bundle in enumerate(received):
            if source != self.rank:
                self._decode(bundle, source, transport.ranks[source])
        if self._divisors is not None:
            self.x.mul_(self._divisors)
        self._bundle_rooms.give_back()
        self._compressor.meter.add(self._tally)
        self._compressor.meter.add(self._spread_tally)

    def _keep(self, packets: list[Tensor]) -> None:
        """One message of all packets that hold values: the next transfer uses their memory again."""
        shards, copies = self._cuts[self.rank].shards, len(self._shards) - 1
        kept = [(packet, shard) for packet, shard in zip(packets, shards, strict=True) if shard.numel]
        if not kept:
            return
        lengths = [len(packet) for packet, _ in kept]
        told = 0 if self._compressor.bounded else messages.directory_bytes(len(kept))
        spans = messages.packet_spans(lengths, told)
        end = spans[-1][1]
        buffer = self._bundle_rooms.take(end, self.x.device)
        if told:
            messages.write_directory(buffer, lengths)
        written = told
        for (packet, shard), (start, stop) in zip(kept, spans, strict=True):
            buffer[written:start] = 0
            buffer[start:stop].copy_(packet)
            written = stop
            self._compressor.forwarded(packet, shard, self.x.dtype, self._spread_tally, copies)
        self._bundle, self._packet_bytes = buffer, sum(lengths)

    def _packet_sizes(self, source: int) -> list[int] | None:
        """The bytes of each packet in the bundle of a rank of the group, if they are bounded."""
        shards = [shard for shard in self._cuts[source].shards if shard.numel]
        return self._compressor.message_sizes(shards, self.x.dtype)

    def _bundle_sizes(self) -> list[int] | None:
        """The bytes of each rank's bundle, if they are bounded."""
        sizes: list[int] = []
        for source in range(len(self._shards)):
            packets = self._packet_sizes(source)
            if packets is None:
                return None
            sizes.append(messages.packet_spans(packets)[-1][1] if packets else 0)
        return sizes

    def _decode(self, bundle: Tensor, source: int, sender: int) -> None:
        """The packets of a rank's shard, as it has got them from their encoders. sender: who passes them on."""
        shards = [shard for shard in self._cuts[source].shards if shard.numel]
        if not shards:
            return
        sizes = self._packet_sizes(source)
        packets = (
            messages.split_message(bundle, len(shards))
            if sizes is None
            else messages.split_bounded(bundle, sizes)
        )
        for packet, shard in zip(packets, shards, strict=True):
            part = self._shards[source][shard.start : shard.stop]
            self._compressor.decode(packet, part, shard, self._spread_tally, leg=Leg.RESULT, sender=sender)


def grouped_all_reduce(
    x: Tensor, layout: BucketLayout, compressor: Compressor, levels: Levels, op: Op = "avg"
) -> None:
    """Replaces x by its sum or average over all ranks of all groups, and waits for it; see `GroupedReduction`.

    Example:
        control = ProcessGroupTransport(dist.group.WORLD)
        levels = Levels.of(Topology.in_groups(control.world_size, 4), control)
        compressor = Compressor(Plan.of(2.0), ["gradient"])
        compressor.expect_groups()
        layout = BucketLayout.of(["gradient"], [x.numel()], control.world_size)
        grouped_all_reduce(x, layout, compressor, levels)
    """
    reduction = GroupedReduction(x, layout, compressor, levels, op)
    reduction.encode()
    reduction.scatter_and_reduce(levels.scatter)
    reduction.exchange_and_reduce(levels.exchange)
    reduction.gather_and_decode(levels.gather)
    reduction.spread(levels.spread)
