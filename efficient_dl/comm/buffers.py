"""Memory that is used again: fresh pages can cost more than the codecs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class BufferPool:
    """Byte buffers to take and give back, from any thread.

    A large fresh tensor comes from the kernel page by page, at a fault each: filling 24 MiB took 0.4 ms in used memory
    and 1 to 65 ms in fresh memory on a virtual machine; encoding as much takes about 4 ms. On a GPU, torch's own
    allocator keeps freed memory: there the pool keeps nothing.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """Returns uint8 of at least num_bytes, 1-D, with any content: the smallest free buffer that is large enough.

        If there is none, a new one takes the place of the largest free one, so that the pool never holds more buffers
        than were in use at once.
        """
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        with self._lock:
            self._free.sort(key=Tensor.numel)
            for position, buffer in enumerate(self._free):
                if buffer.numel() >= num_bytes:
                    return self._free.pop(position)
            del self._free[-1:]
        return _reusable(num_bytes)

    def give(self, buffers: list[Tensor]) -> None:
        """Takes back what `take` returned and nobody uses any more."""
        with self._lock:
            self._free += [buffer for buffer in buffers if buffer.device.type == "cpu"]


class Rooms:
    """What one job has taken from a pool, to be given back together."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self.taken: list[Tensor] = []

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """Returns uint8 of num_bytes, 1-D, with any content."""
        self.taken.append(self._pool.take(num_bytes, device))
        return self.taken[-1][:num_bytes]

    def give_back(self) -> None:
        """Nobody uses any of it any more."""
        self._pool.give(self.taken)
        self.taken = []


class ReceiveBuffers:
    """Memory for one message from each rank, used again for its next one; see `BufferPool`."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def take(self, source: int, num_bytes: int) -> Tensor:
        """Returns uint8 of num_bytes on the CPU, 1-D, with any content, valid until the next call for this rank."""
        buffer = self._buffers.get(source)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[source] = _reusable(num_bytes)
        return buffer[:num_bytes]


def _reusable(num_bytes: int) -> Tensor:
    """With an eighth to spare; no tensor of inference mode, which could not be written to outside of it."""
    with torch.inference_mode(False):
        return torch.empty(num_bytes + num_bytes // 8, dtype=torch.uint8)
