"""A codec with its plan, its state and its meter: what the collectives encode and decode with."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_dl.codec import Codec, PacketStats, dropped_blocks, make_codec, segment_bits
from efficient_dl.comm import sections as messages
from efficient_dl.comm.buffers import BufferPool
from efficient_dl.comm.common_step import CommonStep, Leg
from efficient_dl.comm.deferred import Deferred
from efficient_dl.comm.layout import Shard
from efficient_dl.comm.meter import Meter, Tally
from efficient_dl.comm.packing import WITH_CAPACITY, WITHOUT_HOST, Packing
from efficient_dl.comm.plan import MAX_RATE, MIN_RATE, Plan
from efficient_dl.comm.rates import Rates
from efficient_dl.comm.residuals import Residuals, redistributed
from efficient_dl.comm.sections import Section, sections_of
from efficient_dl.comm.squares import relative, squares
from efficient_dl.comm.state_checks import STATE_VERSION, check_nothing_waits, check_state
from efficient_dl.comm.transport import Transport
from efficient_dl.errors import CorruptPacket

SAMPLE_EVERY_STEPS = 20
_RATES_WITH_LARGEST_PACKETS = (MIN_RATE, 2.0, MAX_RATE)
_NO_RESIDUALS: Mapping[str, Any] = {"scale": 1.0, "parameters": {}}
_log = logging.getLogger(__name__)


class Compressor:
    """Encodes and decodes shards of named parameters, and counts.

    plan: which codec for which parameter. names: the parameters that can occur; the meter has a row for each.
    residuals: with plan.error_feedback, where what packets leave out is kept.
    Every `SAMPLE_EVERY_STEPS`-th step, starting with the first, it also decodes what it has encoded, to measure the
    relative error (an exact codec has none), and takes the entropies of a part of each parameter (`segment_bits`).

    A message is what one rank sends another for one shard: a packet, or several (`sections`). If `bounded`, the plan
    says how long it is (`message_sizes`), and with Triton nothing here waits for the device but in sampled steps.
    """

    def __init__(
        self, plan: Plan, names: Sequence[str], kernel: str = "auto", residuals: Residuals | None = None
    ) -> None:
        assert plan.error_feedback == (residuals is not None)
        plan.check_names(names)
        self.residuals = residuals
        self._kernel = kernel
        self._codecs: dict[str, Codec] = {}
        self._legs = 2
        self._controlled_bytes = 0
        self._bytes_before = 0
        self._unscaled: frozenset[str] = frozenset()
        self._deferred = Deferred()
        self._has_coarsened = False
        self._lock = threading.Lock()
        self.follow(plan)
        self.meter = Meter(list(names))
        self.buffers = BufferPool()
        self._identity = self._codec("identity")

    def follow(self, plan: Plan) -> None:
        """Goes over to a plan, between two steps: rates and common steps begin anew; meter and residuals stay.

        Where the new plan's packets do not take all residuals along, call `Residuals.start_draining`, too.
        """
        self.plan = plan
        self.rates = Rates(plan)
        rate = float(plan.codec.partition(":")[2]) if plan.has_common_step else 0.0
        self.common_step = CommonStep(rate, self._legs) if plan.has_common_step else None
        # Under the plan "none" nothing is ever encoded; only the meter and the state are used.
        self.codec: Codec = self._codec("identity" if plan.codec == "none" else plan.codec)
        self.exact = self.codec.exact and all(self._codec(codec).exact for _, codec in plan.overrides)
        self.bounded = plan.is_bounded

    def feeds_back(self, name: str) -> bool:
        """Whether packets take the residual of this parameter along."""
        return self.plan.error_feedback and not self._codec(self.plan.codec_for(name)).exact

    def expect_groups(self) -> None:
        """Reductions in groups are to come: their sums get a common step of their own. All ranks call it together."""
        self._legs = len(Leg)
        if self.common_step is not None:
            self.common_step.has_legs(self._legs)

    @property
    def samples(self) -> bool:
        """Whether this step's packets are also measured."""
        return self.meter.steps % SAMPLE_EVERY_STEPS == 0

    def is_timed(self, device: torch.device) -> bool:
        """Whether the meter's seconds are those of codecs and transfers, not of what was only launched."""
        return not (self.bounded and self.codec.kernel_for(device) == WITHOUT_HOST)

    def max_bytes(self, shard: Shard, dtype: torch.dtype) -> int:
        """The largest message of a shard; a bounded one is that long."""
        if self.bounded:
            return messages.packet_spans(messages.capacities_of(shard, self.plan, dtype))[-1][1]
        sections = self._sections(shard)
        packets = sum(messages.padded(self._max_packet_bytes(section, dtype)) for section in sections)
        return messages.directory_bytes(len(sections)) + packets

    def message_sizes(self, shards: Sequence[Shard], dtype: torch.dtype) -> list[int] | None:
        """The bytes of these shards' messages if they are bounded, else None: then they have to be told."""
        return [self.max_bytes(shard, dtype) for shard in shards] if self.bounded else None

    def raw_bytes(self, shard: Shard, dtype: torch.dtype) -> int:
        """What a shard's message takes with the identity codec, as the meter counts it."""
        return sum(self._identity.max_bytes(section.numel, dtype) for section in self._sections(shard))

    def begin_step(self, loss_scale: float = 1.0, unscaled: frozenset[str] = frozenset()) -> None:
        """Starts the packets of a step, whose gradients are scaled by loss_scale.

        unscaled: see `sections_of`; equal on all ranks.
        """
        self._unscaled = unscaled
        if self.common_step is not None:
            self.common_step.begin(loss_scale)
        if self.residuals is not None:
            self.residuals.begin(loss_scale)

    def end_step(self, exposed_seconds: float) -> None:
        """Counts a step, whose backward pass waited so long for its last buckets, and sets the next one's rates.

        Raises CorruptPacket for a bounded message that a device has decoded since the last but one call.
        """
        self._deferred.look()
        if self.samples:
            self._settle()
        self.meter.stepped(exposed_seconds)
        sent = self.meter.totals.wire_bytes
        with self._lock:
            controlled, self._controlled_bytes = self._controlled_bytes, 0
        missed = self.rates.stepped(controlled, sent - self._bytes_before - controlled)
        self._bytes_before = sent
        if missed:
            if self.meter.totals.budget_misses == 0:
                _log.warning(
                    "bytes_per_step=%d cannot be kept: %d bytes were sent at the lowest rate; raise it, use larger "
                    "buckets or fewer overrides (counted as budget_misses)",
                    self.plan.bytes_per_step,
                    sent - self._bytes_before + controlled,
                )
            self.meter.totals.budget_misses += 1

    def agree(self, transport: Transport) -> None:
        """After `end_step`: all ranks agree on a common step size, if the plan has one; every rank calls it.

        Without it each packet keeps searching for its own. What it sends is counted.
        """
        if self.common_step is not None and self.common_step.is_due(self.meter.steps):
            self.meter.sent_beside(self.common_step.agree(transport))

    def commit_step(self) -> None:
        """The optimizer has applied the step: its residuals count (see `Residuals`)."""
        if self.residuals is not None:
            self.residuals.commit()

    def encode(
        self,
        x: Tensor,
        room: Tensor,
        shard: Shard,
        tally: Tally,
        copies: int,
        residual_units: float = 1.0,
        leg: Leg = Leg.CONTRIBUTION,
    ) -> Tensor:
        """Returns the message of x, the values of a shard, and counts that it leaves in so many copies.

        room: uint8, at least `max_bytes`; the message is its front.
        residual_units: 1 for contributions, the number of ranks for their average (`Residuals.take`).
        leg: which part of its way x makes (see `CommonStep`).
        """
        sections = self._sections(shard, leg)
        capacities = messages.capacities_of(shard, self.plan, x.dtype) if self.bounded else None
        lengths: list[int] = []
        stop = 0 if self.bounded else messages.directory_bytes(len(sections))
        for position, section in enumerate(sections):
            start = messages.padded(stop)
            stats = PacketStats() if self._wants_stats(section, x.device) else None
            begun = time.perf_counter()
            values = section.gather(x)
            capacity = None if capacities is None else capacities[position]
            packing = Packing(values, room[start:], section, stats, capacity, self._codec, self._note_coarser)
            codec, length, coded = self._encode(packing, tally, residual_units)
            tally.encoded(stats, time.perf_counter() - begun)
            if stats is not None:
                if self.samples and coded.numel():
                    turn = self.meter.steps // SAMPLE_EVERY_STEPS
                    tally.measured(section, segment_bits(codec, coded, section.segments, stats, turn))
                if self.common_step is not None and section.is_default:
                    self.common_step.count(stats, leg)
            elif self.bounded and codec.name.startswith(WITH_CAPACITY) and values.numel():
                self._deferred.drop(dropped_blocks(room[start:]))
            tally.sent(section, length, self._identity.max_bytes(values.numel(), x.dtype), copies)
            if self.samples and not (codec.exact or self._knows_error(codec, section)):
                self._measure_error(codec, values, room[start : start + length], section, tally)
            lengths.append(length)
            stop = start + length
            if section.is_default:
                with self._lock:
                    self._controlled_bytes += length * copies
        if not self.bounded:
            messages.write_directory(room, lengths)
        framing = stop - sum(lengths)
        tally.totals.wire_bytes += framing * copies
        return room[:stop]

    def decode(
        self,
        message: Tensor,
        out: Tensor,
        shard: Shard,
        tally: Tally,
        accumulate: bool = False,
        leg: Leg = Leg.CONTRIBUTION,
        *,
        sender: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Decodes the message of a shard into out, or adds it to out.

        leg: as its encoder was told. sender: which rank of the job that is; None: this one, in the shadow.
        dtype: of what was encoded; None: out's.
        Raises CorruptPacket, which names the sender; where the host does not wait, `end_step` does.
        """
        start = time.perf_counter()
        try:
            self._decode(message, out, shard, accumulate, leg, sender, dtype or out.dtype)
        except CorruptPacket as error:
            if sender is None:
                raise
            where = ", ".join(shard.names[:2]) + (", ..." if len(shard.names) > 2 else "")
            raise type(error)(
                f"rank {sender}'s packet: {error.problem}",
                **{"where": f"gradients or weights of {where}"} | error.details,
            ) from error
        tally.totals.decode_seconds += time.perf_counter() - start

    def _decode(
        self,
        message: Tensor,
        out: Tensor,
        shard: Shard,
        accumulate: bool,
        leg: Leg,
        sender: int | None,
        dtype: torch.dtype,
    ) -> None:
        sections = self._sections(shard, leg)
        for section, packet in zip(sections, self._split(message, shard, sections, dtype), strict=True):
            values = (
                section.gather(out)
                if accumulate or len(section.pieces) == 1
                else out.new_empty(section.numel)
            )
            codec = self._codec(section.codec)
            waits = not self.bounded or sender is None or codec.kernel_for(out.device) != WITHOUT_HOST
            errors = None if waits or sender is None else self._deferred.errors(sender, out.device)
            codec.decode(packet, values, accumulate=accumulate, side=section.side, errors=errors)
            section.scatter(values, out)

    def forwarded(self, message: Tensor, shard: Shard, dtype: torch.dtype, tally: Tally, copies: int) -> None:
        """Counts that a shard's message, received from its encoder, leaves here as it is in so many copies."""
        sections = self._sections(shard, Leg.RESULT)
        packets = self._split(message, shard, sections, dtype)
        for section, packet in zip(sections, packets, strict=True):
            raw_bytes = self._identity.max_bytes(section.numel, dtype)
            tally.sent(section, len(packet), raw_bytes, copies)
            if section.is_default:
                with self._lock:
                    self._controlled_bytes += len(packet) * copies
        tally.totals.wire_bytes += (len(message) - sum(map(len, packets))) * copies

    def sum(
        self,
        own: Tensor,
        incoming: Sequence[Tensor],
        rank: int,
        shard: Shard,
        tally: Tally,
        total: Tensor,
        senders: Sequence[int],
        leg: Leg = Leg.CONTRIBUTION,
    ) -> Tensor:
        """Makes total the sum of all ranks' values of a shard, in float32 and in rank order, and returns it.

        own: this rank's values, which take part unquantized. incoming: by rank, the others' messages; the own one is
        not read. total: float32, 1-D, shard.numel values of any content. senders: `Transport.ranks`, for errors.
        leg: of the messages.
        """
        for source, message in enumerate(incoming):
            if source != rank:
                sender = senders[source]
                self.decode(message, total, shard, tally, source > 0, leg, sender=sender, dtype=own.dtype)
            elif source == 0:
                total.copy_(own)
            else:
                total.add_(own)
        return total

    def discard_step(self) -> None:
        """The optimizer has skipped the step, and its loss scale need not tell: its residuals are forgotten."""
        if self.residuals is not None:
            self.residuals.discard()

    def meter_state(self) -> dict[str, Any]:
        """The meter's state, with what a device has counted, for which it waits."""
        self._settle()
        return self.meter.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs on this rank, keyed by parameter name: numbers and strings, and with error
        feedback a float32 tensor for each parameter. Raises CorruptPacket as `end_step` does, but waits for it."""
        self._deferred.check()
        return {
            "version": STATE_VERSION,
            "plan": self.plan.facts(),
            "meter": self.meter_state(),
            "rates": self.rates.state_dict(),
            "common_step": None if self.common_step is None else self.common_step.state_dict(),
            "residuals": None if self.residuals is None else self.residuals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from a `state_dict`.

        Raises PlanMismatch if it was saved under another plan, CheckpointError if it is of another model or version.
        """
        self.check_state(state)
        if self.residuals is None:
            check_nothing_waits([state])
        self._deferred = Deferred()
        self.meter.load_state_dict(state["meter"])
        self._bytes_before = self.meter.totals.wire_bytes
        self.rates.load_state_dict(state["rates"])
        if self.common_step is not None:
            self.common_step.load_state_dict(state["common_step"])
        if self.residuals is not None:
            # A state of a run that kept none, under a plan that leaves nothing out.
            kept: Mapping[str, Any] | None = state["residuals"]
            self.residuals.load_state_dict(_NO_RESIDUALS if kept is None else kept)

    def start_afresh(self) -> None:
        """Forgets what was counted and left out: it belongs to another run."""
        self._deferred = Deferred()
        self.meter.load_state_dict(Meter(list(self.meter.parameters)).state_dict())
        self._bytes_before = 0
        if self.residuals is not None:
            self.residuals.load_state_dict(_NO_RESIDUALS)

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]], residuals: bool = True) -> None:
        """Continues from states of another number of ranks; the meter starts again from zero.

        Rates become the ranks' mean, a common step size stays. residuals: the states are those of all ranks, so that
        residuals can be redistributed (see `redistributed`); else they start from zero.
        """
        for state in states:
            self.check_state(state)
        if residuals and self.residuals is None:
            check_nothing_waits(states)
        self.start_afresh()
        self.rates.load_mean([state["rates"] for state in states])
        if self.common_step is not None:
            self.common_step.load_positions(states[0]["common_step"])
        if self.residuals is not None and residuals:
            self.residuals.load_state_dict(
                redistributed([state["residuals"] or _NO_RESIDUALS for state in states])
            )

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would for a state that does not fit."""
        check_state(state, self.plan, self.meter.parameters)

    def _codec(self, spec: str) -> Codec:
        codec = self._codecs.get(spec)
        if codec is None:
            codec = self._codecs[spec] = make_codec(spec, kernel=self._kernel)
        return codec

    def _max_packet_bytes(self, section: Section, dtype: torch.dtype) -> int:
        varies = self.plan.varies_rates and section.is_default
        family = section.codec.partition(":")[0]
        rates = [f"{family}:{rate}" for rate in _RATES_WITH_LARGEST_PACKETS]
        specs = rates if varies else [section.codec]
        return max(self._codec(spec).max_bytes(section.numel, dtype, section.side) for spec in specs)

    def _encode(self, packing: Packing, tally: Tally, residual_units: float) -> tuple[Codec, int, Tensor]:
        """Encodes a section's values; returns the codec that was used, the packet's bytes, which are the capacity if
        there is one, and in a sampled step what was encoded."""
        x, section = packing.values, packing.section
        spec = self.rates.codec(section.codec, section.names) if section.is_default else section.codec
        codec = self._codec(spec)
        is_controlled = self.plan.max_error is not None and section.is_default
        residuals = self.residuals if not codec.exact and x.numel() else None
        if not self._knows_error(codec, section) or not x.numel():
            return codec, packing.write(codec), x
        lent = self.buffers.take(4 * x.numel(), x.device)
        before = lent[: 4 * x.numel()].view(torch.float32)
        if residuals is not None:
            residuals.take(section, residual_units, before)
        else:
            before.zero_()
        signal = x.float() + before if is_controlled or self.samples else None
        while True:
            residual = before.clone() if is_controlled else before
            length = packing.write(codec, residual)
            error = relative(residual, signal) if is_controlled and signal is not None else 0.0
            again = self.rates.raised(codec.name, error) if is_controlled else None
            if again is None:
                break
            codec = self._codec(again)
        if is_controlled:
            self.rates.settled(codec.name, section.names, error)
            tally.totals.bound_misses += self._misses(error)
        if residuals is not None:
            residuals.give(section, residual, residual_units)
        if signal is not None and self.samples:
            tally.erred(section, squares(residual, section), squares(signal, section))
        self.buffers.give([lent])
        return codec, length, x if signal is None else signal.to(x.dtype)

    def _split(
        self, message: Tensor, shard: Shard, sections: Sequence[Section], dtype: torch.dtype
    ) -> list[Tensor]:
        if self.bounded:
            return messages.split_bounded(message, messages.capacities_of(shard, self.plan, dtype))
        return messages.split_message(message, len(sections))

    def _wants_stats(self, section: Section, device: torch.device) -> bool:
        """Whether a packet's statistics are taken: those of Triton's kernels cost more than the packet."""
        return (
            self.samples or not self.bounded or self._codec(section.codec).kernel_for(device) != WITHOUT_HOST
        )

    def _note_coarser(self, section: Section) -> None:
        """Counts a packet that is coded again, and says so once."""
        with self._lock:
            is_first = not self._has_coarsened
            self._has_coarsened = True
        self.meter.coarsened()
        if is_first:
            _log.warning(
                "a bounded packet of %s did not fit, and is coded with fewer bits (counted as coarser_packets); "
                'raise bits, or use messages="exact", if that comes often',
                ", ".join(section.names[:3]),
            )

    def _settle(self) -> None:
        """Adds what the device alone has counted; waits for it."""
        dropped = self._deferred.dropped()
        if dropped:
            self.meter.dropped(dropped)

    def _sections(self, shard: Shard, leg: Leg = Leg.CONTRIBUTION) -> tuple[Section, ...]:
        sections = sections_of(shard, self.plan, self._unscaled)
        step = self.common_step.step(leg) if self.common_step is not None else None
        return sections if step is None else tuple(section.with_step(step) for section in sections)

    def _knows_error(self, codec: Codec, section: Section) -> bool:
        """Whether encoding a section also gives what its packet leaves out."""
        return not codec.exact and (
            self.residuals is not None or (self.plan.max_error is not None and section.is_default)
        )

    def _misses(self, error: float) -> int:
        bound = self.plan.max_error
        return int(bound is not None and error > bound)

    def _measure_error(self, codec: Codec, x: Tensor, packet: Tensor, section: Section, tally: Tally) -> None:
        signal = x.float()
        decoded = torch.empty_like(signal)
        codec.decode(packet, decoded, side=section.side)
        error = decoded.sub_(signal)
        tally.erred(section, squares(error, section), squares(signal, section))
