"""The all-reduce in two levels: full precision inside a node, compressed between nodes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from efficient_dl.comm.collectives import Op, Reduction
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout, Shard
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.topology import Topology
from efficient_dl.comm.transport import Divisible, Transport, Work
from efficient_dl.errors import ConfigError


@dataclass(frozen=True)
class Levels:
    """One transport for each phase of a `HierarchicalReduction` or a `GroupedReduction`, in the order of the phases.

    scatter, spread: among the ranks of a node or group. exchange, gather: among the ranks with the same position on
    their nodes. Where phases overlap, as in `OverlappedReducer`, each has a transport of its own; else two may be one.
    """

    scatter: Transport
    exchange: Transport
    gather: Transport
    spread: Transport

    @staticmethod
    def of(topology: Topology, control: Divisible) -> Levels:
        """Makes the transports; all ranks of control call it at the same time. On CUDA devices one a level, used twice.

        Raises ConfigError if the nodes have different numbers of ranks: reduce flat then.
        """
        if not topology.even or topology.world_size != control.world_size:
            raise ConfigError(
                "no hierarchy over these nodes",
                expected=f"equally many ranks on every node, {control.world_size} in all",
                found=", ".join(str(len(ranks)) for ranks in topology.nodes),
                fix="start as many ranks on every node, or reduce flat",
            )
        inside, across = topology.node_of(control.rank), topology.peers_of(control.rank)
        scatter, exchange = control.subgroup(inside), control.subgroup(across)
        if control.device.type == "cuda":
            return Levels(scatter, exchange, exchange, scatter)
        return Levels(scatter, exchange, control.subgroup(across), control.subgroup(inside))

    @property
    def transports(self) -> list[Transport]:
        """Each of them once."""
        return list({id(t): t for t in (self.scatter, self.exchange, self.gather, self.spread)}.values())


class HierarchicalReduction:
    """One all-reduce of one flat bucket over N nodes of L ranks each, in five steps.

    x, op, divisors: as in `Reduction`. layout: the bucket's parameters; it is cut anew, into L shards. levels: who
    this rank is, and on which node; its transports are passed to the steps.

    The rank at position l of every node sums up the node's l-th shard, in float32 in the order of the ranks; averages
    it over the node if op is "avg"; and rounds it to x's dtype, once. These N node sums are reduced by a `Reduction`
    among the ranks at position l, and its result is spread inside the nodes: every rank gets the same bits. For "avg"
    the result is the mean over the nodes of the nodes' means, which cannot overflow half precision on the way.

    What moves inside a node is raw, neither encoded nor quantized; the meter counts it as `local_bytes`. Its wire and
    raw bytes, and with them `ratio`, are of what leaves the node. A lossless codec gives the identity codec's bits; a
    non-finite value reaches all ranks; with one rank a node, this is `Reduction`, bit for bit.
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
        self._compressor = compressor
        self._local_rank = inside.rank
        self._shards = [x[shard.start : shard.stop] for shard in self.layout.shards]
        self._own = self._shards[inside.rank]
        self._tally = Tally(self.layout)
        self._across: Reduction | None = None
        if across.world_size > 1 and self._own.numel():
            shard = self.layout.shards[inside.rank]
            inner = cut_again(shard, across.world_size)
            parts = None if divisors is None else divisors[shard.start : shard.stop]
            units = float(inside.world_size) if op == "avg" else 1.0
            self._across = Reduction(self._own, inner, compressor, across.rank, op, parts, units)

    def scatter_and_reduce(self, transport: Transport) -> None:
        """Step 1: sends the other shards to their ranks on this node, and puts the node's sum of the own one into x."""
        if transport.world_size == 1:
            return
        sizes = [_bytes(self._own).numel()] * transport.world_size
        incoming = self._transfer(transport.exchange([_bytes(part) for part in self._shards], sizes))
        buffer = self._compressor.buffers.take(4 * self._own.numel(), self.x.device)
        total = buffer[: 4 * self._own.numel()].view(torch.float32)
        for source, message in enumerate(incoming):
            part = message.view(self.x.dtype)
            if source == 0:
                total.copy_(part)
            else:
                total.add_(part)
        self._own.copy_(total.div_(len(incoming)) if self.op == "avg" else total)
        self._compressor.buffers.give([buffer])

    def encode(self) -> None:
        """Step 2: encodes what the other nodes sum up of it."""
        if self._across is not None:
            self._across.encode()

    def exchange_and_reduce(self, transport: Transport) -> None:
        """Step 3: sends that to them, sums up the own part, encodes the sum."""
        if self._across is not None:
            self._across.exchange_and_reduce(transport)

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 4: distributes it to the other nodes, and decodes what they have summed up."""
        if self._across is not None:
            self._across.gather_and_decode(transport)

    def spread(self, transport: Transport) -> None:
        """Step 5: distributes the own shard inside the node, and adds the counts to the meter."""
        if transport.world_size > 1:
            sizes = [_bytes(part).numel() for part in self._shards]
            received = self._transfer(transport.gather(_bytes(self._own), sizes))
            for source, (message, part) in enumerate(zip(received, self._shards, strict=True)):
                if source != self._local_rank:
                    part.copy_(message.view(self.x.dtype))
        self._compressor.meter.add(self._tally)

    def _transfer(self, work: Work[list[Tensor]]) -> list[Tensor]:
        start = time.perf_counter()
        incoming = work.wait()
        self._tally.totals.transport_seconds += time.perf_counter() - start
        self._tally.totals.local_bytes += work.sent_bytes
        return incoming


def hierarchical_all_reduce(
    x: Tensor, layout: BucketLayout, compressor: Compressor, levels: Levels, op: Op = "avg"
) -> None:
    """Replaces x by its sum or average over all ranks of all nodes, and waits for it; see `HierarchicalReduction`.

    Example:
        control = ProcessGroupTransport(dist.group.WORLD)
        levels = Levels.of(Topology.discover(control, os.environ, socket.gethostname()), control)
        compressor = Compressor(Plan.of(2.0), ["gradient"])
        layout = BucketLayout.of(["gradient"], [x.numel()], control.world_size)
        hierarchical_all_reduce(x, layout, compressor, levels)
    """
    reduction = HierarchicalReduction(x, layout, compressor, levels, op)
    reduction.scatter_and_reduce(levels.scatter)
    reduction.encode()
    reduction.exchange_and_reduce(levels.exchange)
    reduction.gather_and_decode(levels.gather)
    reduction.spread(levels.spread)


@lru_cache(maxsize=4096)
def cut_again(shard: Shard, num_shards: int) -> BucketLayout:
    """A shard as a bucket of its own, whose shards still tell where in their parameters they begin."""
    layout = BucketLayout.of(shard.names, shard.segments, num_shards)
    begin = dict(zip(shard.names, shard.offsets, strict=True))
    shards = tuple(
        replace(
            part,
            offsets=tuple(
                offset + begin[name] for name, offset in zip(part.names, part.offsets, strict=True)
            ),
        )
        for part in layout.shards
    )
    return replace(layout, shards=shards)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)
