"""What a device finds out while the host does not wait for it: corrupt packets, by sender, and blocks that were cut."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.errors import CorruptPacket


@dataclass
class _Look:
    """A copy on its way to the host, complete once its event is (None: at once)."""

    senders: list[int]
    counts: Tensor
    event: torch.cuda.Event | None


class Deferred:
    """Counts on the device, and looks at them without waiting; from any thread."""

    def __init__(self) -> None:
        self._errors: dict[int, Tensor] = {}
        self._dropped: Tensor | None = None
        self._look: _Look | None = None
        self._lock = threading.Lock()

    def errors(self, sender: int, device: torch.device) -> Tensor:
        """What `Codec.decode` takes as errors, for the packets of one rank."""
        with self._lock:
            if sender not in self._errors:
                self._errors[sender] = torch.zeros(1, dtype=torch.int64, device=device)
                _synchronize(device)  # once: `look` may run on another stream
            return self._errors[sender]

    def drop(self, num_blocks: Tensor) -> None:
        """Counts blocks that a packet had no room for. num_blocks: 0-dim, on the device."""
        with self._lock:
            if self._dropped is None:
                self._dropped = torch.zeros((), dtype=torch.int64, device=num_blocks.device)
            self._dropped.add_(num_blocks)

    def dropped(self) -> int:
        """Waits for the device; how many blocks were dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, None
        if dropped is None:
            return 0
        _synchronize(dropped.device)
        return int(dropped)

    def look(self) -> None:
        """Between steps: starts to copy the counts to the host, and raises what an earlier look has brought.

        Raises CorruptPacket, which names the sender: one step late on a GPU, whose gradients were NaN meanwhile.
        """
        with self._lock:
            arrived, self._look = self._look, None
            if arrived is not None and arrived.event is not None and not arrived.event.query():
                self._look = arrived
                return
            if self._errors:
                self._look = _started(self._errors)
        for sender, count in zip(arrived.senders, arrived.counts, strict=True) if arrived else ():
            if int(count):
                raise CorruptPacket(
                    f"rank {sender}'s packet is not valid",
                    where="a bounded message, decoded on the device in one of the last two steps",
                    found="NaN has taken its values' place",
                    fix="go on from the last checkpoint; check that all ranks run the same release",
                )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _started(errors: dict[int, Tensor]) -> _Look:
    counts = torch.cat(list(errors.values()))
    if counts.device.type != "cuda":
        return _Look(list(errors), counts.clone(), None)
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Look(list(errors), host, event)
