"""A transport in memory: the ranks are threads of one process, for tests and for trying things out."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_dl.comm.transport import SIZE_BYTES
from efficient_dl.errors import TransportError


class LoopbackHub:
    """Connects `world_size` transports: `hub.transport(rank)` is one rank's end."""

    def __init__(self, world_size: int, timeout: float = 30.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._links: dict[tuple[int, int], queue.SimpleQueue[Tensor | None]] = {
            (source, target): queue.SimpleQueue()
            for source in range(world_size)
            for target in range(world_size)
        }
        self._siblings: list[LoopbackHub] = []
        self._lock = threading.Lock()

    def transport(self, rank: int) -> LoopbackTransport:
        """The end of this rank; to be used by one thread at a time."""
        return LoopbackTransport(self, rank)

    def sibling(self, number: int) -> LoopbackHub:
        """The hub of the ranks' siblings with this number, 0 for the first."""
        with self._lock:
            while len(self._siblings) <= number:
                self._siblings.append(LoopbackHub(self.world_size, self.timeout))
            return self._siblings[number]

    def disconnect(self, rank: int) -> None:
        """Ends a rank as a crash would: whoever waits for it, or it for others, gets a TransportError at once."""
        for peer in range(self.world_size):
            self._links[rank, peer].put(None)
            self._links[peer, rank].put(None)

    def send(self, source: int, target: int, message: Tensor) -> None:
        """Delivers a copy, as a network would."""
        self._links[source, target].put(message.clone())

    def receive(self, source: int, target: int, seconds: float) -> Tensor:
        """Waits for the next message on one link."""
        try:
            message = self._links[source, target].get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TransportError(
                f"rank {target} waited in vain for rank {source}", where=f"loopback, {seconds:.1f} s"
            ) from None
        if message is None:
            raise TransportError(f"rank {target} lost rank {source}", where="loopback")
        return message


class LoopbackTransport:
    """One rank's end of a `LoopbackHub`; implements `Transport`."""

    def __init__(self, hub: LoopbackHub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.world_size = hub.world_size
        self.ranks = range(hub.world_size)
        self.device = torch.device("cpu")
        self._num_siblings = 0

    def exchange(self, outgoing: list[Tensor], sizes: Sequence[int] | None = None) -> LoopbackWork:
        """See `Transport.exchange`."""
        return self._start(outgoing, sizes)

    def gather(self, packet: Tensor, sizes: Sequence[int] | None = None) -> LoopbackWork:
        """See `Transport.gather`."""
        return self._start([packet] * self.world_size, sizes)

    def _start(self, outgoing: list[Tensor], sizes: Sequence[int] | None) -> LoopbackWork:
        for target, message in enumerate(outgoing):
            if target != self.rank:
                self._hub.send(self.rank, target, message)
        return LoopbackWork(self._hub, self.rank, outgoing, sizes)

    def sibling(self) -> LoopbackTransport:
        """See `Transport.sibling`."""
        self._num_siblings += 1
        return self._hub.sibling(self._num_siblings - 1).transport(self.rank)

    def abort(self) -> None:
        """See `Transport.abort`."""
        self._hub.disconnect(self.rank)

    def close(self) -> None:
        """See `Transport.close`."""


class LoopbackWork:
    """Messages on their way to one rank; implements `Work`."""

    def __init__(
        self, hub: LoopbackHub, rank: int, outgoing: list[Tensor], sizes: Sequence[int] | None
    ) -> None:
        self._hub = hub
        self._rank = rank
        self._own = outgoing[rank]
        size_bytes = SIZE_BYTES if sizes is None else 0
        self._known = sizes
        self.sent_bytes = sum(
            message.numel() + size_bytes for target, message in enumerate(outgoing) if target != rank
        )

    def wait(self, timeout: float | None = None) -> list[Tensor]:
        """See `Work.wait`."""
        deadline = time.monotonic() + (self._hub.timeout if timeout is None else timeout)
        incoming = [
            self._own
            if source == self._rank
            else self._hub.receive(source, self._rank, deadline - time.monotonic())
            for source in range(self._hub.world_size)
        ]
        for source, message in enumerate(incoming):
            known = message.numel() if self._known is None or source == self._rank else self._known[source]
            if message.numel() != known:
                raise TransportError(
                    f"rank {source}'s message has another size than all ranks have agreed on",
                    expected=f"{known} bytes",
                    found=f"{message.numel()}",
                )
        return incoming
