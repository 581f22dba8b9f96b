"""What compression would have sent, cost and erred, worked out beside the native collective."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout, Shard
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.pipeline import Pipeline

_SIZE_MESSAGE_BYTES = 8  # as `ProcessGroupTransport` sends one with each packet


class ShadowReducer:
    """Counts, in threads of its own, what compressed all-reduces would take; applies nothing, sends nothing."""

    def __init__(self, compressor: Compressor, rank: int, device: torch.device) -> None:
        self._compressor = compressor
        self._rank = rank
        stages = [ShadowReduction.encode, ShadowReduction.encode_result]
        self._pipeline: Pipeline[ShadowReduction] = Pipeline("edl-shadow", stages, device)

    def submit(
        self, contribution: Tensor, result: Tensor, wait: Callable[[], object], layout: BucketLayout
    ) -> Future[ShadowReduction]:
        """Queues the accounting of one bucket; see `ShadowReduction`."""
        if self._pipeline.stream is not None:
            contribution.record_stream(self._pipeline.stream)
        return self._pipeline.submit(
            ShadowReduction(contribution, result, wait, layout, self._compressor, self._rank)
        )

    def stop(self, timeout: float) -> None:
        """Lets what is queued finish, and ends the threads."""
        self._pipeline.close(timeout)


class ShadowReduction:
    """Encodes and decodes what a `Reduction` would, sends nothing, and counts as if it had.

    contribution: this rank's values of the bucket; nothing else may change them.
    result: what the native all-reduce makes of it, complete when wait() returns; only read.
    """

    def __init__(
        self,
        contribution: Tensor,
        result: Tensor,
        wait: Callable[[], object],
        layout: BucketLayout,
        compressor: Compressor,
        rank: int,
    ) -> None:
        self._contribution = contribution
        self._result = result
        self._wait = wait
        self._layout = layout
        self._compressor = compressor
        self._rank = rank
        self._tally = Tally(layout)

    def encode(self) -> None:
        """Step 1: the packets to the shards' owners. Decoding them stands for decoding as many from the others."""
        for owner, shard in enumerate(self._layout.shards):
            if owner != self._rank:
                part = self._contribution[shard.start : shard.stop]
                self._decode(self._compressor.encode(part, shard, self._tally, copies=1), shard)

    def encode_result(self) -> None:
        """Step 2: the packet of the own shard's result. Decoding it stands for decoding all shards' results."""
        self._wait()
        shards = self._layout.shards
        shard = shards[self._rank]
        copies = len(shards) - 1
        part = self._result[shard.start : shard.stop]
        packet = self._compressor.encode(part, shard, self._tally, copies)
        for _ in shards:
            self._decode(packet, shard)
        self._tally.announced(2 * copies * _SIZE_MESSAGE_BYTES)
        self._compressor.meter.add(self._tally)

    def _decode(self, packet: Tensor, shard: Shard) -> None:
        out = torch.empty(shard.numel, dtype=torch.float32, device=packet.device)
        self._compressor.decode(packet, out, shard, self._tally)
