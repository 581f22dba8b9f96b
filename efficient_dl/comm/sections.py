"""One message a shard, one packet a codec: how parameters with different codecs travel together.

A shard whose parameters share a codec is one packet, and that packet is the message. Otherwise the message is

    int64 length of every packet but the last | zeros to a multiple of 16 | packets, each padded to a multiple of 16

with one packet for each codec, in the order in which the shard first needs them. Both ends know the plan and the
layout, so nothing else has to be said. Of bounded packets they know the lengths, too: without a directory,

    packets, each but the last padded to a multiple of 16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from efficient_dl.codec import Side, make_codec
from efficient_dl.comm.capacity import packet_capacity
from efficient_dl.comm.layout import Shard, joined
from efficient_dl.comm.plan import Plan
from efficient_dl.errors import CorruptPacket

_ALIGNMENT = 16


@dataclass(frozen=True)
class Section:
    """The values of a shard that one codec codes together, in one packet.

    is_default: no override names its codec, so that the plan's control of rates applies.
    pieces: (start, stop) within the shard; neighbours are joined.
    parameters, names, offsets: of its segments, as in `Shard`.
    """

    codec: str
    is_default: bool
    pieces: tuple[tuple[int, int], ...]
    parameters: tuple[int, ...]
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    side: Side

    @property
    def numel(self) -> int:
        """The number of values."""
        return sum(stop - start for start, stop in self.pieces)

    @property
    def segments(self) -> tuple[int, ...]:
        """How many values it holds of each of its parameters."""
        return self.side.segments or ()

    def with_step(self, step_size: float) -> Section:
        """The same section, coded with this step, unless an override names its codec."""
        if not self.is_default:
            return self
        return replace(self, side=Side(self.side.segments, step_size=step_size))

    def gather(self, x: Tensor) -> Tensor:
        """Its values of a shard's: a view if they lie together, else a copy."""
        if len(self.pieces) == 1:
            start, stop = self.pieces[0]
            return x[start:stop]
        return torch.cat([x[start:stop] for start, stop in self.pieces])

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Puts back what `gather` took; does nothing if that was a view."""
        if len(self.pieces) > 1:
            parts = values.split_with_sizes([stop - start for start, stop in self.pieces])
            for (start, stop), part in zip(self.pieces, parts, strict=True):
                out[start:stop].copy_(part)


@lru_cache(maxsize=4096)
def sections_of(shard: Shard, plan: Plan, unscaled: frozenset[str] = frozenset()) -> tuple[Section, ...]:
    """The sections of a shard, at least one; an empty shard has one of the plan's codec.

    unscaled: parameters of the default codec "grid:RATE" that have no scale yet; they take "bits:RATE", because their
        values would be lost beside scaled ones.
    """
    rules = [_rule(plan, name, unscaled) for name in shard.names]
    if len(set(rules)) <= 1:
        codec, is_default = rules[0] if rules else (plan.codec, True)
        whole = ((0, shard.numel),)
        return (Section(codec, is_default, whole, shard.parameters, shard.names, shard.offsets, shard.side),)
    return tuple(_section(shard, rules, rule) for rule in dict.fromkeys(rules))


@lru_cache(maxsize=4096)
def capacities_of(shard: Shard, plan: Plan, dtype: torch.dtype) -> tuple[int, ...]:
    """The bytes of each section's packet in the messages of a plan that is bounded. dtype: of what is encoded."""
    return tuple(
        packet_capacity(make_codec(section.codec, kernel="reference"), section.numel, dtype, section.side)
        for section in sections_of(shard, plan)
    )


def _rule(plan: Plan, name: str, unscaled: frozenset[str]) -> tuple[str, bool]:
    override = plan.override_for(name)
    if override is None and name in unscaled:
        return plan.codec.replace("grid", "bits"), True
    return override or plan.codec, override is None


def _section(shard: Shard, rules: Sequence[tuple[str, bool]], rule: tuple[str, bool]) -> Section:
    chosen = [position for position, one in enumerate(rules) if one == rule]
    stops = (0, *accumulate(shard.segments))
    pieces = joined([(stops[i], stops[i + 1]) for i in chosen])
    return Section(
        *rule,
        pieces,
        tuple(shard.parameters[i] for i in chosen),
        tuple(shard.names[i] for i in chosen),
        tuple(shard.offsets[i] for i in chosen),
        Side(tuple(shard.segments[i] for i in chosen)),
    )


def directory_bytes(num_packets: int) -> int:
    """Bytes before the first of so many packets."""
    return 0 if num_packets == 1 else padded(8 * (num_packets - 1))


def padded(num_bytes: int) -> int:
    """The next multiple of 16."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def write_directory(message: Tensor, packet_bytes: Sequence[int]) -> None:
    """Writes what comes before the packets. message: uint8, 1-D."""
    if len(packet_bytes) > 1:
        lengths = torch.tensor(packet_bytes[:-1], dtype=torch.int64).view(torch.uint8)
        message[: directory_bytes(len(packet_bytes))] = 0
        message[: lengths.numel()].copy_(lengths)


def split_message(message: Tensor, num_packets: int) -> list[Tensor]:
    """The packets of a message, views. Raises CorruptPacket unless they fill it exactly."""
    if num_packets == 1:
        return [message]
    position = directory_bytes(num_packets)
    if message.numel() < position:
        raise _misfit(message, f"{num_packets} packets")
    lengths = message[: 8 * (num_packets - 1)].cpu().view(torch.int64)
    packets: list[Tensor] = []
    for length in map(int, lengths):
        if not 0 <= length <= message.numel() - position:
            raise _misfit(message, f"a packet of {length} bytes at {position}")
        packets.append(message[position : position + length])
        position = padded(position + length)
    if position > message.numel():
        raise _misfit(message, "padding behind its last packet but one")
    return [*packets, message[position:]]


def packet_spans(lengths: Sequence[int], start: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of each packet of these lengths in a message, which ends with the last of them.

    start: the bytes of the directory; 0 in a bounded message.
    """
    spans: list[tuple[int, int]] = []
    stop = start
    for length in lengths:
        start = padded(stop)
        stop = start + length
        spans.append((start, stop))
    return spans


def split_bounded(message: Tensor, capacities: Sequence[int]) -> list[Tensor]:
    """The packets of a bounded message, views. Raises CorruptPacket for a message of another length."""
    spans = packet_spans(capacities)
    if message.numel() != spans[-1][1]:
        raise _misfit(message, f"a bounded message of {spans[-1][1]} bytes")
    return [message[start:stop] for start, stop in spans]


def _misfit(message: Tensor, content: str) -> CorruptPacket:
    return CorruptPacket(
        "a message's parts do not fit it", expected=content, found=f"{message.numel()} bytes in all"
    )
