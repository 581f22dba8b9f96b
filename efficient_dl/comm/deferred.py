"""What a device finds out while the host does not wait for it: corrupt packets, by sender, and blocks that were cut."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
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
    """Counts on the device, and looks at them without waiting; from any thread.

    What counts runs on one stream at a time, that of a pipeline, and so do the looks: they see what was launched before
    them. Another pipeline, and its stream, takes over between two steps.
    """

    def __init__(self) -> None:
        self._errors: dict[int, Tensor] = {}
        self._dropped: Tensor | None = None
        self._look: _Look | None = None
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def errors(self, sender: int, device: torch.device) -> Tensor:
        """What `Codec.decode` takes as errors, for the packets of one rank, on the current stream."""
        with self._lock:
            if sender not in self._errors:
                self._errors[sender] = torch.zeros(1, dtype=torch.int64, device=device)
            self._follow(device)
            return self._errors[sender]

    def drop(self, num_blocks: Tensor) -> None:
        """Counts blocks that a packet had no room for. num_blocks: 0-dim, on the device."""
        with self._lock:
            if self._dropped is None:
                self._dropped = torch.zeros((), dtype=torch.int64, device=num_blocks.device)
            self._follow(num_blocks.device)
            self._dropped.add_(num_blocks)

    def dropped(self) -> int:
        """Waits for the device; how many blocks were dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, None
            if dropped is None:
                return 0
            with self._on_stream():
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
                with self._on_stream():
                    self._look = _started(self._errors, self._stream)
        if arrived is not None:
            _raise_if_any(arrived.senders, arrived.counts)

    def check(self) -> None:
        """Waits for the device, and raises as `look` does, for all that was decoded so far."""
        with self._lock:
            if not self._errors:
                return
            with self._on_stream():
                senders, counts = list(self._errors), torch.cat(list(self._errors.values())).cpu()
        _raise_if_any(senders, counts)

    def _follow(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)

    def _on_stream(self) -> AbstractContextManager[object]:
        """Also on its device, which need not be the current one."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _started(errors: dict[int, Tensor], stream: torch.cuda.Stream | None) -> _Look:
    counts = torch.cat(list(errors.values()))
    if stream is None:
        return _Look(list(errors), counts, None)
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    event = torch.cuda.Event()
    event.record(stream)
    return _Look(list(errors), host, event)


def _raise_if_any(senders: Sequence[int], counts: Tensor) -> None:
    for sender, count in zip(senders, counts, strict=True):
        if int(count):
            raise CorruptPacket(
                f"rank {sender}'s packet is not valid",
                where="a bounded message, decoded on the device in one of the last steps",
                found="NaN has taken its values' place",
                fix="go on from the last checkpoint; check that all ranks run the same release",
            )
