"""What compression would have sent, cost and erred, worked out beside the native collective."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from efficient_dl.comm.buffers import Rooms
from efficient_dl.comm.collectives import Op
from efficient_dl.comm.common_step import Leg
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

    def watch(self, x: Tensor, layout: BucketLayout, divisors: Tensor | None = None) -> ShadowReduction:
        """Copies a bucket before the native all-reduce changes it."""
        reduction = ShadowReduction(x, layout, self._compressor, self._rank, divisors)
        if self._pipeline.stream is not None:
            reduction.contribution.record_stream(self._pipeline.stream)
            if divisors is not None:
                divisors.record_stream(self._pipeline.stream)
        return reduction

    def submit(self, reduction: ShadowReduction, wait: Callable[[], object]) -> Future[ShadowReduction]:
        """Queues the accounting of a bucket; wait() returns when the native all-reduce is complete."""
        reduction.wait = wait
        return self._pipeline.submit(reduction)

    def stop(self, timeout: float) -> None:
        """Lets what is queued finish, and ends the threads."""
        self._pipeline.close(timeout)


class ShadowReduction:
    """Encodes and decodes what a `Reduction` would, sends nothing, and counts as if it had.

    x: a bucket with this rank's values, copied here and now; the native all-reduce then replaces them by its result,
        which is read after `wait`.
    divisors, op: as in `Reduction`.
    """

    wait: Callable[[], object]

    def __init__(
        self,
        x: Tensor,
        layout: BucketLayout,
        compressor: Compressor,
        rank: int,
        divisors: Tensor | None = None,
        op: Op = "avg",
    ) -> None:
        self._result = x
        self._op = op
        self._divisors = divisors
        self._layout = layout
        self._compressor = compressor
        self._rank = rank
        self._tally = Tally(layout)
        self._rooms = Rooms(compressor.buffers)
        self.contribution = self._rooms.take(x.numel() * x.element_size(), x.device).view(x.dtype).copy_(x)
        if divisors is not None:
            self.contribution.div_(divisors)

    def encode(self) -> None:
        """Step 1: the packets to the shards' owners. Decoding them stands for decoding as many from the others."""
        for owner, shard in enumerate(self._layout.shards):
            if owner != self._rank:
                part = self.contribution[shard.start : shard.stop]
                self._decode(self._encode(part, shard, copies=1), shard, Leg.CONTRIBUTION)

    def encode_result(self) -> None:
        """Step 2: the packet of the own shard's result. Decoding it stands for decoding all shards' results."""
        self.wait()
        shards = self._layout.shards
        shard = shards[self._rank]
        copies = len(shards) - 1
        result = self._result[shard.start : shard.stop]
        if self._divisors is not None:
            result = (result / self._divisors[shard.start : shard.stop]).to(result.dtype)
        units = float(len(shards)) if self._op == "avg" else 1.0
        packet = self._encode(result, shard, copies, units, Leg.RESULT)
        for _ in shards:
            self._decode(packet, shard, Leg.RESULT)
        self._rooms.give_back()
        if not self._compressor.bounded:
            self._tally.announced(2 * copies * _SIZE_MESSAGE_BYTES)
        self._compressor.meter.add(self._tally)

    def _encode(
        self, x: Tensor, shard: Shard, copies: int, residual_units: float = 1.0, leg: Leg = Leg.CONTRIBUTION
    ) -> Tensor:
        room = self._rooms.take(self._compressor.max_bytes(shard, x.dtype), x.device)
        return self._compressor.encode(x, room, shard, self._tally, copies, residual_units, leg)

    def _decode(self, packet: Tensor, shard: Shard, leg: Leg) -> None:
        buffer = self._compressor.buffers.take(4 * shard.numel, packet.device)
        out = buffer[: 4 * shard.numel].view(torch.float32)
        self._compressor.decode(packet, out, shard, self._tally, leg=leg)
        self._compressor.buffers.give([buffer])
