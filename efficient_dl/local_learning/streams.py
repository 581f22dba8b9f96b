"""The channels of one rank: between which ranks activations go forward, and how many will."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec import Codec
from efficient_dl.comm.channel import ChannelTotals, TensorReceiver, TensorSender
from efficient_dl.comm.process_group import ProcessGroupTransport
from efficient_dl.coordinator.assignment import Assignment
from efficient_dl.errors import EdlError

_STOP_SECONDS = 1.0
_FIRST_TAG = 16  # the process group transport uses the first ones


@dataclass(frozen=True)
class StreamOptions:
    """How activations travel.

    codec: what encodes them, None sends them as they are. depth: messages in the queue at each end of a channel.
    """

    codec: Codec | None = None
    depth: int = 4


class Streams:
    """One rank's channels for as long as an assignment holds.

    transport: among all ranks, on gloo, used by these channels alone. passes: how many micro-batches each pass
    takes that will go through, training steps and evaluations; on all ranks the same.
    """

    def __init__(
        self,
        assignment: Assignment,
        transport: ProcessGroupTransport,
        passes: Sequence[int],
        options: StreamOptions,
        device: torch.device,
    ) -> None:
        self._assignment = assignment
        self._transport = transport
        self._rank = transport.rank
        self._senders: dict[tuple[int, int], TensorSender] = {}
        self._receivers: dict[tuple[int, int], TensorReceiver] = {}
        counts = _messages(assignment, passes)
        for (cut, source, target), count in sorted(counts.items()):
            common = (_FIRST_TAG + cut, options.codec, options.depth)
            if source == self._rank:
                self._senders[cut, target] = TensorSender(transport, target, *common)
            if target == self._rank:
                self._receivers[cut, source] = TensorReceiver(transport, source, *common, count, device)

    def send(self, partition: int, micro_batch: int, features: Tensor, step: int) -> None:
        """Hand a partition's output to the rank that does the next partition on this micro-batch."""
        target = self._assignment.rank_for(partition + 1, micro_batch)
        self._senders[partition, target].put(features, step)

    def receive(self, partition: int, micro_batch: int) -> Tensor:
        """What the partition before this one made of this micro-batch."""
        return self._receivers[partition - 1, self._assignment.rank_for(partition - 1, micro_batch)].get()

    def totals(self) -> ChannelTotals:
        """Sums over this rank's ends of channels."""
        sums = ChannelTotals()
        for end in (*self._senders.values(), *self._receivers.values()):
            sums.add(end.totals)
        return sums

    def leads(self) -> dict[int, tuple[float, int]]:
        """By partition that receives: how many steps its source was ahead, on average and at most."""
        ends: dict[int, ChannelTotals] = {}
        for (cut, _), receiver in self._receivers.items():
            ends.setdefault(cut + 1, ChannelTotals()).add(receiver.totals)
        return {
            index: (sums.lead_sum / max(sums.messages, 1), sums.lead_most) for index, sums in ends.items()
        }

    def finish(self) -> None:
        """Wait until everything has been sent and received. Raises TransportError."""
        for sender in self._senders.values():
            sender.finish()
        for receiver in self._receivers.values():
            receiver.join(self._transport.timeout)

    def stop(self) -> None:
        """Give up: end the threads, and break the connections, so that no rank waits for this one."""
        ends = (*self._senders.values(), *self._receivers.values())
        for end in ends:
            end.stop()
        if ends:
            self._transport.abort()
        for end in ends:
            with contextlib.suppress(EdlError):  # that the transfers are broken off
                end.join(_STOP_SECONDS)


def _messages(assignment: Assignment, passes: Sequence[int]) -> Counter[tuple[int, int, int]]:
    """How many messages go over each (cut, source, target); a cut is the partition before it."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for cut in range(len(assignment.ranks) - 1):
        if not assignment.ranks[cut + 1]:
            continue
        for size, repeats in Counter(passes).items():
            for micro_batch in range(size):
                source, target = (assignment.rank_for(k, micro_batch) for k in (cut, cut + 1))
                if source != target:
                    counts[cut, source, target] += repeats
    return counts
