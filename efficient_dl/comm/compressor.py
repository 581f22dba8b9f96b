"""A codec with its plan and its meter: what the collectives encode and decode with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from efficient_dl.codec import Codec, PacketStats, make_codec
from efficient_dl.comm.buffers import BufferPool
from efficient_dl.comm.layout import Shard
from efficient_dl.comm.meter import Meter, Tally
from efficient_dl.comm.plan import Plan
from efficient_dl.errors import CheckpointError, PlanMismatch

SAMPLE_EVERY_STEPS = 20
_STATE_VERSION = 1


class Compressor:
    """Encodes and decodes shards of named parameters, and counts.

    plan: which codec. names: the parameters that can occur; the meter has a row for each.
    Every `SAMPLE_EVERY_STEPS`-th step, starting with the first, it also decodes what it has encoded, to measure the
    relative error (an exact codec has none, and is not measured).
    """

    def __init__(self, plan: Plan, names: list[str], kernel: str = "auto") -> None:
        self.plan = plan
        # Under the plan "none" nothing is ever encoded; only the meter and the state are used.
        self.codec: Codec = make_codec("identity" if plan.codec == "none" else plan.codec, kernel=kernel)
        self.meter = Meter(names)
        self.buffers = BufferPool()
        self._identity = make_codec("identity")

    @property
    def samples_error(self) -> bool:
        """Whether the packets of this step are also measured for their error."""
        return not self.codec.exact and self.meter.steps % SAMPLE_EVERY_STEPS == 0

    def max_bytes(self, shard: Shard, dtype: torch.dtype) -> int:
        """The largest packet of a shard."""
        return self.codec.max_bytes(shard.numel, dtype, shard.side)

    def encode(self, x: Tensor, room: Tensor, shard: Shard, tally: Tally, copies: int) -> Tensor:
        """Returns the packet of x, the values of a shard, and counts that it leaves in so many copies.

        room: uint8, at least `max_bytes`; the packet is its front.
        """
        stats = PacketStats()
        start = time.perf_counter()
        packet = room[: int(self.codec.encode_into(x, room, shard.side, stats))]
        tally.encoded(stats, time.perf_counter() - start)
        tally.sent(shard, packet.numel(), self._identity.max_bytes(x.numel(), x.dtype), copies)
        if self.samples_error:
            self._measure_error(x, packet, shard, tally)
        return packet

    def decode(
        self, packet: Tensor, out: Tensor, shard: Shard, tally: Tally, accumulate: bool = False
    ) -> None:
        """Decodes the packet of a shard into out, or adds it to out."""
        start = time.perf_counter()
        self.codec.decode(packet, out, accumulate=accumulate, side=shard.side)
        tally.totals.decode_seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs on this rank: plain numbers and strings, keyed by parameter name."""
        return {"version": _STATE_VERSION, "plan": asdict(self.plan), "meter": self.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from a `state_dict`.

        Raises PlanMismatch if it was saved under another plan, CheckpointError if it is of another model or version.
        """
        if state.get("version") != _STATE_VERSION:
            raise CheckpointError(
                "the compression state is of another version",
                expected=str(_STATE_VERSION),
                found=str(state.get("version")),
            )
        saved = Plan(**state["plan"])
        if saved.fingerprint() != self.plan.fingerprint():
            raise PlanMismatch(
                f"the checkpoint was written under plan {saved.fingerprint()}, this run has {self.plan.fingerprint()}",
                differs=f"codec = {saved.codec} (checkpoint), {self.plan.codec} (run)",
                fix="resume with the bits the run was started with, or leave the compression state out",
            )
        unknown = sorted(set(state["meter"]["parameters"]) ^ set(self.meter.parameters))
        if unknown:
            raise CheckpointError(
                "the compression state belongs to another model",
                differs=f"parameter {unknown[0]!r} (and {len(unknown) - 1} more) is in only one of the two",
            )
        self.meter.load_state_dict(state["meter"])

    def _measure_error(self, x: Tensor, packet: Tensor, shard: Shard, tally: Tally) -> None:
        signal = x.float()
        decoded = torch.empty_like(signal)
        self.codec.decode(packet, decoded, side=shard.side)
        error = decoded.sub_(signal)
        tally.erred(shard, _squares(error, shard), _squares(signal, shard))


def _squares(x: Tensor, shard: Shard) -> list[float]:
    parts = x.split_with_sizes(shard.segments)
    return [float(part.square().sum(dtype=torch.float64)) for part in parts]
