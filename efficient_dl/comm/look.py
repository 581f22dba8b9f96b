"""A short look at links and codecs while a run goes on, when it is due, and what of a run's own counts calls for one.

A look measures what `probe` does, with fewer and shorter tries: about half a second. Looks are paid from an allowance
of a share of the run's time. A regular one waits until the allowance is full; one that a change in the run's own
counts calls for, or that is to confirm the last one, takes what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from efficient_dl.comm.codec_timing import codec_speed, packet_cost
from efficient_dl.comm.handshake import gather_json
from efficient_dl.comm.hierarchy import Levels
from efficient_dl.comm.measurements import CodecSpeed, Measurements, PacketCost, merged
from efficient_dl.comm.probe import exchange_line, native_line
from efficient_dl.comm.transport import Transport

LOOK_NUMEL = 1 << 20  # of a gradient, on which codecs are timed again
_CODEC_TRIES = 3
_DTYPES = {4: torch.float32, 2: torch.bfloat16, 1: torch.uint8}  # what native collectives of such values take
_SLOWER, _OTHER_LINE, _OTHER_BITS = 1.15, 1.5, 1.05


def look(
    known: Measurements,
    transport: Transport,
    native: Callable[[Tensor], object],
    levels: Levels | None,
    itemsize: int,
    sample: Tensor | None,
    segments: Sequence[int],
    kernel: str = "auto",
    native_one_way: bool = False,
    feeds_back: bool = False,
) -> Measurements:
    """`known` with links and codecs as they are now; all ranks call it together, and get the same.

    sample: 1-D values of a gradient that was neither quantized nor reduced, at most `LOOK_NUMEL`; segments: their
    parameters' numels. None on any rank: codecs stay as they are known. itemsize: of the values, bytes.
    levels: of a hierarchy, where one can be had; idle. native_one_way: as `native_line` takes it.
    feeds_back: whether this run feeds errors back, whatever `known` was measured for.
    Pairs of nodes are not measured again. Raises TransportError if a rank is gone.
    """
    own: dict[str, Any] = {}
    if sample is not None and sample.numel():
        packet = packet_cost(known.codecs[-1].codec, sample, kernel, feeds_back)
        speeds = [
            codec_speed(
                one.codec, sample, segments, known.world_size, packet, kernel, feeds_back, _CODEC_TRIES
            )
            for one in known.codecs
        ]
        own = {
            "packet": [packet.encode_seconds, packet.decode_seconds, packet.num_bytes],
            "codecs": [
                [one.codec, one.encode_seconds, one.decode_seconds, one.bytes_per_value] for one in speeds
            ],
        }
    everyone = gather_json(own, transport)
    if all(everyone):
        known = replace(
            known,
            codecs=merged([[CodecSpeed(*one) for one in theirs["codecs"]] for theirs in everyone]),
            packet=PacketCost(*map(max, zip(*(theirs["packet"] for theirs in everyone), strict=True))),
            feeds_back=feeds_back,
        )
    exchange = exchange_line(transport, transport, glance=True)
    slower = exchange.latency_seconds / max(known.exchange.latency_seconds, 1e-9)
    return replace(
        known,
        native=native_line(native, transport, _DTYPES[itemsize], native_one_way, glance=True),
        exchange=exchange,
        told_seconds=known.told_seconds * slower,
        between=exchange_line(levels.exchange, transport, glance=True) if levels else known.between,
        inside=exchange_line(levels.scatter, transport, glance=True) if levels else known.inside,
        links=(),
    )


@dataclass(frozen=True)
class Allowance:
    """How many looks a run may take, such that they cost no more than `share` of its time, beside the first few.

    full: how many may be saved up. looks: that are left. cost: of the last one, seconds.
    """

    share: float = 0.005
    full: float = 4.0
    looks: float = 3.0
    cost: float = 1.0  # a guess until a look has been timed

    def shared(self, count: int) -> Allowance:
        """An even part for each of so many that look by themselves; each may save up one look at least."""
        if count < 2:
            return self
        full = max(self.full / count, 1.0)
        return replace(self, share=self.share / count, full=full, looks=min(self.looks / count, full))

    def earned(self, seconds: float) -> Allowance:
        """After so many seconds of training."""
        return replace(self, looks=min(self.looks + self.share * seconds / self.cost, self.full))

    def spent(self, seconds: float) -> Allowance:
        """After a look that took so long."""
        return replace(self, looks=self.looks - 1, cost=max(seconds, 1e-3))

    def allows(self, early: bool) -> bool:
        """Whether a look may begin. early: because something calls for it."""
        return self.looks >= (1 if early else self.full)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """What some steps were like, over all ranks.

    step_seconds: of the slowest rank. line_seconds: what a byte took, as our collectives saw it, the mean of the ranks'
    medians; 0.0: torch's own collective carried all. bits: a value's in packets, before headers; 0.0: none were made.
    """

    step_seconds: float
    line_seconds: float = 0.0
    bits: float = 0.0

    def differs(self, before: Window) -> str | None:
        """What has changed so much that a look is worth it, one phrase; None if nothing has."""
        if _apart(self.step_seconds, before.step_seconds, _SLOWER):
            return "steps take another time"
        if _apart(self.line_seconds, before.line_seconds, _OTHER_LINE):
            return "bytes take another time"
        if _apart(self.bits, before.bits, _OTHER_BITS):
            return "values take other bits"
        return None


def _apart(now: float, before: float, factor: float) -> bool:
    return now > 0 < before and not before / factor <= now <= before * factor
