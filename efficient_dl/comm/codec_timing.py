"""How long a codec takes, and how many bytes it makes, on the shards that ranks would encode in training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_dl.comm.common_step import FEWEST_VALUES
from efficient_dl.comm.compressor import SAMPLE_EVERY_STEPS, Compressor
from efficient_dl.comm.layout import BLOCK_NUMEL, BucketLayout
from efficient_dl.comm.loopback import LoopbackHub
from efficient_dl.comm.measurements import CodecSpeed, PacketCost
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.plan import Plan
from efficient_dl.comm.residuals import Residuals
from efficient_dl.comm.transport import SIZE_BYTES

_TRIES, _PACKET_TRIES = 5, 12
_SETTLING = 4  # steps until residuals are there, and a common step keeps to the rate with them
_SHIFT = 0.382  # of the values; the golden section comes back late
_COLD_BYTES = 64 << 20  # touched before a codec is timed: in training a gradient has left the caches, too
assert 1 + _SETTLING + _PACKET_TRIES < SAMPLE_EVERY_STEPS  # a step that is sampled takes longer


def packet_cost(codec: str, sample: Tensor, kernel: str = "auto", feeds_back: bool = False) -> PacketCost:
    """What a packet of one block takes; its values count for nothing. Medians of a few tries. See `codec_speed`."""
    values = sample[:BLOCK_NUMEL].contiguous()
    layout = BucketLayout.of(["values"], [values.numel()], 1)
    encode, decode, num_bytes = _Timed(codec, layout, values, kernel, feeds_back).run(_PACKET_TRIES)
    return PacketCost(encode, decode, max(num_bytes - values.numel() * _bits(codec) / 8, 0.0) + SIZE_BYTES)


def codec_speed(
    codec: str,
    sample: Tensor,
    segments: Sequence[int],
    world_size: int,
    packet: PacketCost,
    kernel: str = "auto",
    feeds_back: bool = False,
    tries: int = _TRIES,
) -> CodecSpeed:
    """Times a codec on the shards that a bucket of these values has on so many ranks; medians of a few tries.

    codec: "lossless", "bits:RATE" or "grid:RATE", with one step for all packets. sample: 1-D; segments: its parameters'
    numels. packet: what each of these packets takes anyway, and is not counted here. feeds_back: what is lossy is timed
    with error feedback.
    """
    layout = BucketLayout.of([str(number) for number in range(len(segments))], list(segments), world_size)
    timed = _Timed(codec, layout, sample, kernel, feeds_back, _COLD_BYTES)
    encode, decode, num_bytes = timed.run(tries)
    numel, packets = sample.numel(), timed.packets
    return CodecSpeed(
        codec,
        max(encode - packets * packet.encode_seconds, 0.1 * encode) / numel,
        max(decode - packets * packet.decode_seconds, 0.1 * decode) / numel,
        max(num_bytes - packets * (packet.num_bytes - SIZE_BYTES), 0.1 * num_bytes) / numel,
    )


def copy_seconds(sample: Tensor, times: int) -> float:
    """What copying a value so many times takes, between its gradient and a bucket; the median of a few tries."""
    if not times:
        return 0.0
    other, cold = torch.empty_like(sample), torch.zeros(_COLD_BYTES, dtype=torch.uint8, device=sample.device)
    found: list[float] = []
    for _ in range(_TRIES):
        cold.add_(1)
        start = now(sample.device)
        other.copy_(sample)
        found.append(now(sample.device) - start)
    return times * statistics.median(found) / sample.numel()


class _Timed:
    """A bucket's shards, encoded and decoded through a `Compressor`, whose own time is a part of a reduction's.

    packets: how many there are. cold: bytes of other memory to touch before each timing.
    """

    def __init__(
        self, codec: str, layout: BucketLayout, values: Tensor, kernel: str, feeds_back: bool, cold: int = 0
    ) -> None:
        self._layout = layout
        self._shards = [shard for shard in layout.shards if shard.numel]
        self._given, self._values = values, values.clone()
        self._parts = [self._values[shard.start : shard.stop] for shard in self._shards]
        self._device = values.device
        plan = _plan(codec, feeds_back)
        numels = dict(zip(layout.names, layout.numels, strict=True))
        residuals = Residuals(numels, values.device) if plan.error_feedback else None
        self._compressor = Compressor(plan, list(layout.names), kernel, residuals)
        self._compressor.meter.stepped(0.0)  # in the first step errors and entropies would be sampled
        self._alone = LoopbackHub(1).transport(0)
        self._rooms = [
            values.new_empty(self._compressor.max_bytes(shard, values.dtype), dtype=torch.uint8)
            for shard in self._shards
        ]
        self._totals = [torch.zeros_like(part, dtype=torch.float32) for part in self._parts]
        self._other = torch.zeros(cold, dtype=torch.uint8, device=values.device)
        self._shift = 0
        self.packets = len(self._shards)
        if plan.has_common_step or plan.error_feedback:
            # A common step is agreed on for no fewer values.
            repeats = -(-FEWEST_VALUES // values.numel()) if plan.has_common_step else 1
            for _ in range(_SETTLING):
                self._step(repeats)

    def run(self, tries: int) -> tuple[float, float, int]:
        """Seconds to encode, and to decode and add, medians; and the packets' mean bytes.

        Bytes vary from step to step with errors that are fed back, at low rates by much.
        """
        seconds = [self._step() for _ in range(tries)]
        encoding, decoding, num_bytes = zip(*seconds, strict=True)
        return statistics.median(encoding), statistics.median(decoding), round(statistics.mean(num_bytes))

    def _step(self, repeats: int = 1) -> tuple[float, float, int]:
        compressor, tally = self._compressor, Tally(self._layout)
        if compressor.residuals is not None:
            # The same gradient in every step would fall in with what it left over.
            self._shift = (self._shift + round(_SHIFT * self._given.numel())) // BLOCK_NUMEL * BLOCK_NUMEL
            self._values.copy_(self._given.roll(self._shift))
        compressor.begin_step()
        messages: list[Tensor] = []
        self._other.add_(1)
        start = now(self._device)
        for _ in range(repeats):
            messages = [
                compressor.encode(part, room, shard, tally, copies=1)
                for part, room, shard in zip(self._parts, self._rooms, self._shards, strict=True)
            ]
        encoding = now(self._device) - start
        self._other.add_(1)
        start = now(self._device)
        for message, total, shard in zip(messages, self._totals, self._shards, strict=True):
            compressor.decode(message, total, shard, tally, accumulate=True)
        decoding = now(self._device) - start
        compressor.end_step(0.0)
        compressor.commit_step()
        compressor.agree(self._alone)
        return encoding, decoding, sum(map(len, messages))


def _plan(codec: str, feeds_back: bool) -> Plan:
    family, _, rate = codec.partition(":")
    if not rate:
        return Plan.of(codec)
    return Plan.of(float(rate), scale="global" if family == "grid" else "local", error_feedback=feeds_back)


def _bits(codec: str) -> float:
    """Of a value; of an exact codec those of float32 count, which leaves nothing for the packet."""
    rate = codec.partition(":")[2]
    return float(rate) if rate else 32.0


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that a device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
