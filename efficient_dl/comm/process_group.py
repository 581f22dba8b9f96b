"""The transport over torch.distributed: pairwise rounds on CPU groups (gloo), one all-to-all on NCCL.

Why rounds, and receives before sends: percent of the link's rate that gloo reaches for messages of 10 MiB between
emulated hosts (benchmarks/exchange.py; the rows, for smaller messages too, are in benchmarks/results/exchange.jsonl):

                                       2 ranks, 100 Mbit/s   1 Gbit/s   4 ranks, 100 Mbit/s   1 Gbit/s
    all_to_all_single                                   47         75                    48         51
    all_gather                                          63         87                    74         86
    batch_isend_irecv, sends first                      48         89                    47         53
    pairwise rounds, sends first                        92         57                    59         68
    batch_isend_irecv, receives first                   94         93                    87         94
    pairwise rounds, receives first                     93         92                    94         94

Sends first is a matter of luck: it is good only where the other side's receive happens to be posted already.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm.buffers import ReceiveBuffers
from efficient_dl.comm.losses import Losses
from efficient_dl.comm.transport import SIZE_BYTES, Work
from efficient_dl.errors import ConfigError, TransportError

DEFAULT_TIMEOUT_SECONDS = 300.0
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_TAG, _ABORT_TAG = 0x7ED1, 0x7ED2  # of messages, so that they meet no receive of the user's in the same group
_GLOO_SOURCE = re.compile(r"^\[.*?\] |\. This is typically caused.*")  # its source line, its general advice


class ProcessGroupTransport:
    """Implements `Transport` on a process group that no one else uses meanwhile.

    group: a process group of torch.distributed with a backend for `device`.
    device: cpu (gloo) or a CUDA device (NCCL; written after its documentation, not yet run on a GPU). Raises
        ConfigError if the group has another backend for it.
    timeout: seconds that one transfer may take. On NCCL a dead peer is noticed by NCCL's own watchdog instead.
    losses: where ranks report whom they have lost, so that all name the same; by default of its own. `sibling` and
        `subgroup` share it: if one of them fails, they all do.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        losses: Losses | None = None,
    ) -> None:
        self.group = group
        self.device = device or torch.device("cpu")
        _check_backend(group, self.device)
        self.timeout = timeout
        self.rank = group.rank()
        self.world_size = group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.receive_buffers = ReceiveBuffers()
        self._losses = losses or Losses(group)
        self._losses.aborts.append(self._break)

    def exchange(self, outgoing: list[Tensor], sizes: Sequence[int] | None = None) -> Work[list[Tensor]]:
        """See `Transport.exchange`."""
        return self._start(outgoing, sizes)

    def gather(self, packet: Tensor, sizes: Sequence[int] | None = None) -> Work[list[Tensor]]:
        """See `Transport.gather`."""
        return self._start([packet] * self.world_size, sizes)

    def _start(self, outgoing: list[Tensor], sizes: Sequence[int] | None) -> Work[list[Tensor]]:
        if self.device.type == "cpu":
            return _PairwiseWork(self, outgoing, sizes)
        return _AllToAllWork(self, outgoing, sizes)

    def sibling(self) -> ProcessGroupTransport:
        """See `Transport.sibling`."""
        return self.subgroup(range(self.world_size))

    def subgroup(self, members: Sequence[int]) -> ProcessGroupTransport:
        """A transport on a new group of some of these ranks, ascending; exactly they call it, in the same order."""
        ranks = [self.ranks[member] for member in members]
        group = dist.new_group(  # pyright: ignore[reportUnknownMemberType]
            ranks,
            timeout=timedelta(seconds=self.timeout),
            backend=_BACKENDS[self.device.type],
            # A part of the ranks synchronizes alone. All ranks do without, because torch then names groups by
            # a counter: names made from ranks and the number of groups come again after a group is destroyed, and
            # with them the old group's addresses.
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        assert isinstance(group, dist.ProcessGroup)
        return ProcessGroupTransport(group, self.device, self.timeout, self._losses)

    def abort(self) -> None:
        """See `Transport.abort`."""
        self._losses.given_up = True
        self._break()

    def _break(self) -> None:
        if self.device.type == "cuda":
            self.group.abort()
        elif self.world_size > 1:
            # gloo's own abort does nothing, but a time-out of any operation closes all connections of the group.
            with suppress(RuntimeError):
                peer = (self.rank + 1) % self.world_size
                work = dist.irecv(torch.empty(1), group=self.group, group_src=peer, tag=_ABORT_TAG)
                assert work is not None
                work.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """See `Transport.close`. Does nothing once torch.distributed was shut down."""
        if self._break in self._losses.aborts:
            self._losses.aborts.remove(self._break)
        with suppress(ValueError):
            if self.world_size < dist.get_world_size():
                self._break()  # but it stays registered, because of the names; see `sibling`
            else:
                dist.destroy_process_group(self.group)

    @contextmanager
    def naming(self, peer: int, doing: str) -> Generator[None]:
        """Turns a failure of torch.distributed into a TransportError that names the peer."""
        try:
            yield
        except RuntimeError as error:
            ranks = self.ranks
            found = _GLOO_SOURCE.sub("", str(error).strip().splitlines()[0])
            timed_out = "timed out" in found.lower()
            lost = self._losses.culprit(ranks[self.rank], ranks[peer], self.timeout, timed_out)
            raise TransportError(
                f"rank {ranks[self.rank]} lost rank {lost} while {doing}"
                + (
                    f" rank {ranks[peer]}, which is waiting for it or has lost it, too"
                    if lost != ranks[peer]
                    else " it"
                ),
                found=found,
                where=f"a transfer among {self.world_size} ranks, limited to {self.timeout:g} s",
                fix=f"read the end of rank {lost}'s log: it has stopped, is stuck or cannot be reached",
            ) from error


def _check_backend(group: dist.ProcessGroup, device: torch.device) -> None:
    expected = _BACKENDS.get(device.type, "none yet")
    try:
        found = group._get_backend(device).name()  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:
        found = "none"
    if found != expected:
        raise ConfigError(
            f"no transport for tensors on {device.type} over this process group",
            expected=f"the backend {expected} for {device.type}",
            found=found,
            fix='dist.init_process_group("cpu:gloo,cuda:nccl")',
        )


class _PairwiseWork:
    """All sizes at once; then, in round k, a receive from rank − k, posted before the send to rank + k."""

    def __init__(
        self, transport: ProcessGroupTransport, outgoing: list[Tensor], sizes: Sequence[int] | None
    ) -> None:
        rank, world_size = transport.rank, transport.world_size
        self._transport = transport
        self._outgoing = outgoing
        self._rounds = [((rank - k) % world_size, (rank + k) % world_size) for k in range(1, world_size)]
        self._receiving: dict[int, dist.Work | None] = {}
        self._sending: dict[int, dist.Work | None] = {}
        self.sent_bytes = sum(outgoing[target].numel() for _, target in self._rounds)
        if sizes is not None:
            self._sizes = {source: torch.tensor([sizes[source]]) for source, _ in self._rounds}
            return
        self._sizes = {source: torch.empty(1, dtype=torch.int64) for source, _ in self._rounds}
        self._own_sizes = {target: torch.tensor([outgoing[target].numel()]) for _, target in self._rounds}
        self._receiving = {source: self._receive(self._sizes[source], source) for source, _ in self._rounds}
        self._sending = {target: self._send(self._own_sizes[target], target) for _, target in self._rounds}
        self.sent_bytes += SIZE_BYTES * len(self._rounds)

    def wait(self, timeout: float | None = None) -> list[Tensor]:
        """See `Work.wait`. The messages move in here."""
        deadline = time.monotonic() + (self._transport.timeout if timeout is None else timeout)
        incoming = list(self._outgoing)
        for source, target in self._rounds:
            self._finish(self._receiving.get(source), source, deadline)
            message = self._transport.receive_buffers.take(source, int(self._sizes[source]))
            receiving = self._receive(message, source) if message.numel() else None
            sending = self._send(self._outgoing[target], target) if self._outgoing[target].numel() else None
            self._finish(receiving, source, deadline)
            self._finish(sending, target, deadline)
            incoming[source] = message
        for target, sending in self._sending.items():
            self._finish(sending, target, deadline)
        return incoming

    def _receive(self, message: Tensor, source: int) -> dist.Work | None:
        with self._transport.naming(source, "receiving from"):
            return dist.irecv(message, group=self._transport.group, group_src=source, tag=_TAG)

    def _send(self, message: Tensor, target: int) -> dist.Work | None:
        with self._transport.naming(target, "sending to"):
            return dist.isend(message, group=self._transport.group, group_dst=target, tag=_TAG)

    def _finish(self, work: dist.Work | None, peer: int, deadline: float) -> None:
        if work is not None:
            seconds = max(deadline - time.monotonic(), 0.001)
            with self._transport.naming(peer, "waiting for"):
                work.wait(timedelta(seconds=seconds))


class _AllToAllWork:
    """Sizes by one all-to-all, then the messages by another; the current CUDA stream orders both."""

    def __init__(
        self, transport: ProcessGroupTransport, outgoing: list[Tensor], sizes: Sequence[int] | None
    ) -> None:
        self._transport = transport
        self._outgoing = outgoing
        others = [message.numel() for peer, message in enumerate(outgoing) if peer != transport.rank]
        self.sent_bytes = sum(others)
        if sizes is not None:
            own = outgoing[transport.rank].numel()  # it takes part, too
            self._sizes = torch.tensor([own if r == transport.rank else size for r, size in enumerate(sizes)])
            return
        self._own_sizes = torch.tensor([message.numel() for message in outgoing], device=transport.device)
        self._sizes = torch.empty_like(self._own_sizes)
        dist.all_to_all_single(  # pyright: ignore[reportUnknownMemberType]
            self._sizes, self._own_sizes, group=transport.group
        )
        self.sent_bytes += SIZE_BYTES * len(others)

    def wait(self, timeout: float | None = None) -> list[Tensor]:
        """See `Work.wait`. Waits on the host for sizes that are not known, on the current stream for the messages."""
        incoming = [
            torch.empty(int(size), dtype=torch.uint8, device=self._transport.device)
            for size in self._sizes.cpu()
        ]
        dist.all_to_all(  # pyright: ignore[reportUnknownMemberType]
            incoming, self._outgoing, group=self._transport.group
        )
        return incoming
