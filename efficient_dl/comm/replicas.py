"""What follows a reduce-scatter where several groups of ranks shard the same model: the own chunk's all-reduce."""

from __future__ import annotations

from torch import Tensor

from efficient_dl.comm.chunks import ChunkLayout
from efficient_dl.comm.collectives import Op, Reduction
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.transport import Transport


class ReplicaReduction:
    """One all-reduce of one rank's chunk over the ranks that hold the same chunk, in three steps, as `Reduction`.

    chunk: 1-D, the rank's chunk after a reduce-scatter, float32, bfloat16 or float16; replaced by the result, the same
        bits on all replicas. Its padding is not sent, and becomes zero.
    layout, shard_rank: whose chunk it is. compressor: one of its own; its residuals are of the own shard alone, so that
        they take no more memory than the shard (`shard_numels`).
    replica_rank, num_replicas, op: of the group of replicas; op as in `Reduction`.
    partial: what earlier backward passes have left to be reduced along, like chunk, added first; or None.
    """

    def __init__(
        self,
        chunk: Tensor,
        layout: ChunkLayout,
        shard_rank: int,
        compressor: Compressor,
        replica_rank: int,
        num_replicas: int,
        op: Op,
        partial: Tensor | None = None,
    ) -> None:
        self._chunk, self._layout, self._shard_rank = chunk, layout, shard_rank
        self._compressor = compressor
        self._replica_rank, self._partial = replica_rank, partial
        self._op: Op = op
        self._bucket = replica_bucket(layout, shard_rank, num_replicas)
        self._reduction: Reduction | None = None

    def encode(self) -> None:
        """Step 1: encodes what the other replicas sum up of it."""
        if self._partial is not None:
            self._chunk.add_(self._partial)
            self._partial = None
        values = self._layout.take(self._chunk, self._shard_rank)
        if values.numel():  # or for no replica: all hold the same shard
            self._reduction = Reduction(values, self._bucket, self._compressor, self._replica_rank, self._op)
            self._reduction.encode()

    def exchange_and_reduce(self, transport: Transport) -> None:
        """Step 2: sends that to them, sums up the own part, encodes the sum."""
        if self._reduction is not None:
            self._reduction.exchange_and_reduce(transport)

    def gather_and_decode(self, transport: Transport) -> None:
        """Step 3: distributes it, decodes what the others have summed up, and adds the counts to the meter."""
        if self._reduction is not None:
            self._reduction.gather_and_decode(transport)
            self._layout.put(self._reduction.x, self._chunk, self._shard_rank)


def replica_bucket(layout: ChunkLayout, shard_rank: int, num_replicas: int) -> BucketLayout:
    """A rank's shard as a bucket, cut between the replicas. Offsets count from where the rank's part begins."""
    shard = layout.bucket.shards[shard_rank]
    return BucketLayout.of(shard.names, shard.segments, num_replicas)


def shard_numels(layout: ChunkLayout, shard_rank: int) -> dict[str, int]:
    """How many values of each parameter a rank holds; parameters of which it holds none are left out."""
    shard = layout.bucket.shards[shard_rank]
    return dict(zip(shard.names, shard.segments, strict=True))
