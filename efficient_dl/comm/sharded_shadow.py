"""What compressing a sharded model's collectives would have sent, cost and erred, beside the native ones."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from efficient_dl.comm.chunks import ChunkLayout
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.gathers import OwnPacket
from efficient_dl.comm.layout import Shard
from efficient_dl.comm.pipeline import Pipeline
from efficient_dl.comm.replicas import replica_bucket
from efficient_dl.comm.shadow import ShadowReduction
from efficient_dl.comm.sharded import ShardedJob

_SIZE_MESSAGE_BYTES = 8  # as `ProcessGroupTransport` sends one with each packet


class ShadowJob(Protocol):
    """One collective's accounting."""

    @property
    def copies(self) -> list[Tensor]:
        """What it has copied, and reads later."""
        ...

    def run(self) -> None:
        """Counts."""
        ...


class ShardedShadow:
    """Counts in a thread of its own, first in, first out; applies nothing, sends nothing."""

    def __init__(self, device: torch.device) -> None:
        self._pipeline: Pipeline[ShadowJob] = Pipeline("edl-shadow", [_run], device)

    def submit(self, job: ShadowJob) -> Future[ShadowJob]:
        """Queues one collective's accounting."""
        if self._pipeline.stream is not None:
            for copied in job.copies:
                copied.record_stream(self._pipeline.stream)
        return self._pipeline.submit(job)

    def stop(self, timeout: float) -> None:
        """Lets what is queued finish, and ends the thread."""
        self._pipeline.close(timeout)


class _Shadow(ShardedJob):
    @property
    def copies(self) -> list[Tensor]:
        """See `ShadowJob.copies`."""
        return self._rooms.taken

    def _decode(self, message: Tensor, shard: Shard) -> None:
        out = self._rooms.take(4 * shard.numel, message.device).view(torch.float32)
        self._compressor.decode(message, out, shard, self._tally)


class ShadowScatter(_Shadow):
    """What a `ReduceScatter` of x would take. x: copied here and now."""

    def __init__(self, x: Tensor, layout: ChunkLayout, compressor: Compressor, rank: int) -> None:
        super().__init__(layout, compressor, rank)
        copied = self._rooms.take(x.numel() * x.element_size(), x.device).view(x.dtype).copy_(x)
        self._chunks = layout.chunks(copied)

    def run(self) -> None:
        """Encodes what would go to the owners. Decoding it stands for decoding as many from the others."""
        for owner, chunk in enumerate(self._chunks):
            if owner != self.rank:
                shard = self.layout.bucket.shards[owner]
                self._decode(self._encode(self.layout.take(chunk, owner), shard, copies=1), shard)
        if not self._compressor.bounded:
            self._tally.announced((len(self._chunks) - 1) * _SIZE_MESSAGE_BYTES)
        self._chunks = []
        self._finish()


class ShadowGather(_Shadow):
    """What an `AllGather` would take.

    own: this rank's chunk, copied here and now. own_packet: as there. size_bytes: what a packet needs beside itself: 8,
        or 1 where its size was told before.
    """

    def __init__(
        self,
        own: Tensor,
        layout: ChunkLayout,
        compressor: Compressor,
        rank: int,
        own_packet: OwnPacket,
        size_bytes: int,
    ) -> None:
        super().__init__(layout, compressor, rank)
        self._size_bytes = size_bytes
        self._own = self._rooms.take(own.numel() * own.element_size(), own.device).view(own.dtype).copy_(own)
        self._own_packet = own_packet

    def run(self) -> None:
        """Encodes the own chunk, unless its packet is there. Decoding it stands for decoding the others'."""
        shard, copies = self.layout.bucket.shards[self.rank], len(self.layout.pieces) - 1
        values = self.layout.take(self._own, self.rank)
        kept = self._own_packet.get(values)
        if kept is None:
            message = self._encode(values, shard, copies)
            self._own_packet.keep(message)
        else:
            message = kept
            raw_bytes = self._compressor.raw_bytes(shard, values.dtype)
            self._tally.sent(shard, len(message), raw_bytes, copies)
        out = torch.empty_like(values)
        for _ in range(copies if self._compressor.exact else copies + 1):
            self._compressor.decode(message, out, shard, self._tally)
        if not self._compressor.bounded:
            self._tally.announced(copies * self._size_bytes)
        self._finish()


class ShadowReplicas:
    """What a `ReplicaReduction` of a chunk would take. chunk: read here and now; `reduced` tells the native result."""

    def __init__(
        self,
        chunk: Tensor,
        layout: ChunkLayout,
        shard_rank: int,
        compressor: Compressor,
        replica_rank: int,
        num_replicas: int,
    ) -> None:
        self._layout, self._rank = layout, shard_rank
        self._values = layout.take(chunk, shard_rank).clone()
        bucket = replica_bucket(layout, shard_rank, num_replicas)
        self._reduction = ShadowReduction(self._values, bucket, compressor, replica_rank)
        self._reduction.wait = _nothing

    @property
    def copies(self) -> list[Tensor]:
        """See `ShadowJob.copies`."""
        return [self._values, self._reduction.contribution]

    def reduced(self, chunk: Tensor) -> None:
        """Copies the chunk's native all-reduce here and now."""
        self._values.copy_(self._layout.take(chunk, self._rank))

    def run(self) -> None:
        """Counts both ways of the all-reduce."""
        if self._values.numel():
            self._reduction.encode()
            self._reduction.encode_result()


def _run(job: ShadowJob) -> None:
    job.run()


def _nothing() -> None:
    """Already done."""
