"""hivemind's 8-bit quantization of gradients, behind our transport, as a hook of DistributedDataParallel.

hivemind averages over its own peer-to-peer network; here its codec alone is compared, in the reduction that ours uses:
shard i to rank i, sum, encode the sum once, send it to all. It quantizes off the main thread, beside backward, as ours.
"""

from __future__ import annotations

import importlib
import importlib.util
from concurrent.futures import Future as Done
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import ProcessGroupTransport

NAME = "hivemind 8 bits"
_CODEBOOK_BYTES = 256 * 4


def missing() -> str | None:
    """Why this machine cannot run it; None if it can."""
    if importlib.util.find_spec("hivemind") is None:
        return "hivemind is not installed: pip install hivemind"
    return None


class HivemindHook:
    """Averages buckets, one after the other, in a thread of its own. close() when the last step is over."""

    def __init__(self, model: DistributedDataParallel, transport: ProcessGroupTransport) -> None:
        compression: Any = importlib.import_module("hivemind.compression")
        self._codec = compression.Uniform8BitQuantization()
        self._transport = transport
        self._thread = ThreadPoolExecutor(1, "hivemind")
        # DDP looks at annotations, and wants classes where this file has their names.
        model.register_comm_hook(None, lambda state, bucket: self._hook(bucket))

    def close(self) -> None:
        """Ends the thread; the transport stays its owner's."""
        self._thread.shutdown()

    def _hook(self, bucket: GradBucket) -> Future[Tensor]:
        result: Future[Tensor] = Future()
        gradient = bucket.buffer()

        def finish(done: Done[None]) -> None:
            if error := done.exception():
                result.set_exception(error)  # type: ignore[arg-type]  # torch's stub wants an Exception
            else:
                result.set_result(gradient)

        self._thread.submit(self._average, gradient).add_done_callback(finish)
        return result

    def _average(self, gradient: Tensor) -> None:
        size, rank = self._transport.world_size, self._transport.rank
        shards = list(gradient.tensor_split(size))
        packets = [self._encode(shard) for shard in shards]
        total = torch.zeros_like(shards[rank])
        for packet in self._transport.exchange(packets).wait():
            total += self._decode(packet)
        total /= size
        for shard, packet in zip(shards, self._transport.gather(self._encode(total)).wait(), strict=True):
            shard.copy_(self._decode(packet))

    def _encode(self, x: Tensor) -> Tensor:
        indices, codebook = self._codec.quantize(x)
        return torch.from_numpy(np.concatenate((codebook.view(np.uint8), indices)))

    def _decode(self, packet: Tensor) -> Tensor:
        codebook = packet[:_CODEBOOK_BYTES].clone().view(torch.float32)
        return codebook[packet[_CODEBOOK_BYTES:].long()]
