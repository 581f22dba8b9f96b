"""Counts what left this rank, what it would have been uncompressed, what it cost and how much it erred."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from efficient_dl.codec import PacketStats, SegmentBits
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.transport import Work

_RECENT_TRANSFERS = 512


@dataclass
class Totals:
    """Sums over collectives, of one rank. Packets are counted once in `encoded_*`, each copy in `wire_bytes`.

    On a GPU statistics are taken of the packets of sampled steps alone: `encoded_*`, bits and blocks are of those.

    wire_bytes: packets and size messages sent to other ranks. raw_bytes: the same with the identity codec.
    local_bytes: uncompressed, to ranks on the same node, by a hierarchical reduction, whose wire_bytes and raw_bytes
        are of what leaves the node.
    native_bytes: the part of both that torch's own collectives sent, which is calculated, not counted.
    values_sent: values in those packets, up to the owners and down from the owner.
    order0_bits … header_bits: of the encoded packets, as in `PacketStats`.
    bound_misses: packets that are above the plan's max_error even at the highest rate. budget_misses: steps that sent
        more than its bytes_per_step even at the lowest one.
    error_squares, signal_squares: sums of squares of the sampled packets' errors and of what they encode.
    """

    wire_bytes: int = 0
    raw_bytes: int = 0
    local_bytes: int = 0
    native_bytes: int = 0
    values_sent: int = 0
    encoded_values: int = 0
    encoded_bytes: int = 0
    order0_bits: float = 0.0
    model_bits: float = 0.0
    scale_bits: float = 0.0
    header_bits: float = 0.0
    escapes: int = 0
    empty_blocks: int = 0
    nonfinite_blocks: int = 0
    bound_misses: int = 0
    budget_misses: int = 0
    dropped_blocks: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    transport_seconds: float = 0.0
    exposed_seconds: float = 0.0
    error_squares: float = 0.0
    signal_squares: float = 0.0

    def add(self, other: Totals) -> None:
        """Adds every field of the other."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class ParameterTotals:
    """One parameter's part. wire_bytes is its packets' bytes apportioned by its number of values in them.

    order0_bits, model_bits: of entropy_values values, sampled as `segment_bits` says.
    """

    values_sent: int = 0
    wire_bytes: float = 0.0
    entropy_values: int = 0
    order0_bits: float = 0.0
    model_bits: float = 0.0
    error_squares: float = 0.0
    signal_squares: float = 0.0

    def add(self, other: ParameterTotals) -> None:
        """Adds every field of the other."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Coded(Protocol):
    """What one packet holds: a whole `Shard` or one of its sections."""

    @property
    def numel(self) -> int:
        """The number of values."""
        ...

    @property
    def parameters(self) -> tuple[int, ...]:
        """The positions of its parameters within the bucket."""
        ...

    @property
    def segments(self) -> tuple[int, ...]:
        """How many values it holds of each of them."""
        ...


@dataclass
class Tally:
    """The counts of one collective on one bucket: filled by one stage after the other, then added to a meter."""

    layout: BucketLayout
    totals: Totals = field(default_factory=Totals)
    parameters: list[ParameterTotals] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [ParameterTotals() for _ in self.layout.names]

    def encoded(self, stats: PacketStats | None, seconds: float) -> None:
        """Counts one packet that was made; without stats its time alone."""
        totals = self.totals
        totals.encode_seconds += seconds
        if stats is None:
            return
        totals.encoded_values += stats.numel
        totals.encoded_bytes += stats.packet_bytes
        totals.order0_bits += stats.order0_bits
        totals.model_bits += stats.model_bits
        totals.scale_bits += stats.scale_bits
        totals.header_bits += stats.header_bits
        totals.escapes += stats.escapes
        totals.empty_blocks += stats.empty_blocks
        totals.nonfinite_blocks += stats.nonfinite_blocks
        totals.dropped_blocks += stats.dropped_blocks

    def sent(self, shard: Coded, packet_bytes: int, raw_bytes: int, copies: int) -> None:
        """Counts one packet of a shard, or of a part of it, that leaves this rank in so many copies."""
        totals = self.totals
        totals.wire_bytes += packet_bytes * copies
        totals.raw_bytes += raw_bytes * copies
        totals.values_sent += shard.numel * copies
        for position, numel in zip(shard.parameters, shard.segments, strict=True):
            row = self.parameters[position]
            row.values_sent += numel * copies
            row.wire_bytes += packet_bytes * copies * (numel / shard.numel)

    def receive(self, work: Work[list[Tensor]], packet_bytes: int) -> list[Tensor]:
        """Waits for a transfer's messages; counts the seconds, and what was sent beside so many bytes of packets."""
        start = time.perf_counter()
        incoming = work.wait()
        self.totals.transport_seconds += time.perf_counter() - start
        self.announced(work.sent_bytes - packet_bytes)
        return incoming

    def announced(self, size_bytes: int) -> None:
        """Counts the size messages, which the identity codec would send as well."""
        self.totals.wire_bytes += size_bytes
        self.totals.raw_bytes += size_bytes

    def erred(self, shard: Coded, error_squares: list[float], signal_squares: list[float]) -> None:
        """Counts a sampled packet's squared error and squared signal, one of each for each segment."""
        if not all(map(math.isfinite, (*error_squares, *signal_squares))):
            return  # a gradient that overflowed says nothing about the codec
        self.totals.error_squares += sum(error_squares)
        self.totals.signal_squares += sum(signal_squares)
        for position, error, signal in zip(shard.parameters, error_squares, signal_squares, strict=True):
            self.parameters[position].error_squares += error
            self.parameters[position].signal_squares += signal

    def measured(self, shard: Coded, bits: Sequence[SegmentBits]) -> None:
        """Counts the sampled entropies of a packet's segments."""
        for position, found in zip(shard.parameters, bits, strict=True):
            row = self.parameters[position]
            row.entropy_values += found.numel
            row.order0_bits += found.order0_bits
            row.model_bits += found.model_bits


class Meter:
    """The running totals of one rank, of all its collectives and by parameter name."""

    def __init__(self, names: list[str]) -> None:
        self.steps = 0
        self.totals = Totals()
        self.parameters = {name: ParameterTotals() for name in names}
        self.transfers: deque[tuple[int, float]] = deque(
            maxlen=_RECENT_TRANSFERS
        )  # bytes and seconds, in this process
        self._lock = threading.Lock()

    def add(self, tally: Tally) -> None:
        """Adds one finished collective; from any thread."""
        with self._lock:
            self.totals.add(tally.totals)
            if tally.totals.transport_seconds:
                self.transfers.append((tally.totals.wire_bytes, tally.totals.transport_seconds))
            for name, row in zip(tally.layout.names, tally.parameters, strict=True):
                self.parameters[name].add(row)

    def stepped(self, exposed_seconds: float) -> None:
        """Counts a step, whose backward pass waited so long for its last buckets."""
        with self._lock:
            self.steps += 1
            self.totals.exposed_seconds += exposed_seconds

    def dropped_beside(self, num_blocks: int) -> None:
        """Counts blocks that were dropped in packets whose statistics were not taken."""
        with self._lock:
            self.totals.dropped_blocks += num_blocks

    def sent_beside(self, num_bytes: int) -> None:
        """Counts bytes that leave beside the collectives, by which ranks agree; the identity codec needs none."""
        with self._lock:
            self.totals.wire_bytes += num_bytes

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers, exactly."""
        with self._lock:
            return {
                "steps": self.steps,
                "totals": asdict(self.totals),
                "parameters": {name: asdict(row) for name, row in self.parameters.items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` of a meter of the same parameters."""
        with self._lock:
            self.steps = state["steps"]
            self.totals = Totals(**state["totals"])
            self.parameters = {name: ParameterTotals(**row) for name, row in state["parameters"].items()}


def native_tally(numels: Mapping[str, int], itemsizes: Mapping[str, int], world_size: int) -> Tally:
    """What a ring all-reduce of these parameters sends from one rank: 2 (n − 1) / n of their bytes, calculated."""
    layout = BucketLayout.of(list(numels), list(numels.values()), world_size)
    tally = Tally(layout)
    share = 2 * (world_size - 1) / world_size
    for row, (name, numel) in zip(tally.parameters, numels.items(), strict=True):
        row.values_sent = round(share * numel)
        row.wire_bytes = row.values_sent * itemsizes[name]
        tally.totals.values_sent += row.values_sent
        tally.totals.wire_bytes += int(row.wire_bytes)
    tally.totals.raw_bytes = tally.totals.native_bytes = tally.totals.wire_bytes
    return tally


def sparse_tally(name: str, numel: int, num_values: int, num_bytes: int, world_size: int) -> Tally:
    """What an all-gather of one sparse gradient's entries sends from one rank: n − 1 times its own, calculated.

    numel: of the parameter. num_values, num_bytes: of this rank's entries, the bytes with their indices.
    """
    tally = Tally(BucketLayout.of([name], [numel], world_size))
    copies = world_size - 1
    row, totals = tally.parameters[0], tally.totals
    totals.values_sent = row.values_sent = copies * num_values
    totals.wire_bytes = totals.raw_bytes = totals.native_bytes = copies * num_bytes
    row.wire_bytes = totals.wire_bytes
    return tally


def combined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several ranks' `Meter.state_dict`s; steps are the first one's."""
    totals = Totals()
    parameters = {name: ParameterTotals() for name in states[0]["parameters"]}
    for state in states:
        totals.add(Totals(**state["totals"]))
        for name, row in state["parameters"].items():
            parameters[name].add(ParameterTotals(**row))
    return {
        "steps": states[0]["steps"],
        "totals": asdict(totals),
        "parameters": {name: asdict(row) for name, row in parameters.items()},
    }


def since(state: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a `Meter.state_dict` has gathered since an earlier one of the same meter (None: since its start)."""
    if earlier is None:
        return dict(state)
    before: Mapping[str, Mapping[str, float]] = earlier["parameters"]
    return {
        "steps": state["steps"] - earlier["steps"],
        "totals": _difference(state["totals"], earlier["totals"]),
        "parameters": {name: _difference(row, before[name]) for name, row in state["parameters"].items()},
    }


def _difference(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {key: value - before.get(key, 0) for key, value in now.items()}


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of a `Meter.state_dict`, or of several, combined.

    Returns bytes in total and per step (native_bytes: those of torch's own collectives, calculated); ratio (raw /
    wire); bits_per_value (sent, overheads included) and its parts per encoded value; seconds in total and per step;
    relative_error (0.0 unless error_sampled) of sampled packets; and a row for each parameter, with order0_bits and
    model_bits per value (0.0 unless entropy_sampled) of the packets of one step in 20, of at most 32 blocks of a
    parameter in each; the totals' own are of all packets.
    """
    steps = max(state["steps"], 1)
    t = Totals(**state["totals"])
    encoded = max(t.encoded_values, 1)
    return {
        "steps": state["steps"],
        "wire_bytes": t.wire_bytes,
        "raw_bytes": t.raw_bytes,
        "local_bytes": t.local_bytes,
        "native_bytes": t.native_bytes,
        "wire_bytes_per_step": t.wire_bytes / steps,
        "raw_bytes_per_step": t.raw_bytes / steps,
        "local_bytes_per_step": t.local_bytes / steps,
        "ratio": _quotient(t.raw_bytes, t.wire_bytes, otherwise=1.0),
        "values_sent": t.values_sent,
        "encoded_values": t.encoded_values,
        "error_sampled": t.signal_squares > 0.0,
        "bits_per_value": _quotient(8 * t.wire_bytes, t.values_sent),
        "encoded_bits": 8 * t.encoded_bytes / encoded,
        "order0_bits": t.order0_bits / encoded,
        "model_bits": t.model_bits / encoded,
        "scale_bits": t.scale_bits / encoded,
        "header_bits": t.header_bits / encoded,
        "escapes": t.escapes,
        "empty_blocks": t.empty_blocks,
        "nonfinite_blocks": t.nonfinite_blocks,
        "bound_misses": t.bound_misses,
        "budget_misses": t.budget_misses,
        "dropped_blocks": t.dropped_blocks,
        "codec_seconds": t.encode_seconds + t.decode_seconds,
        "transport_seconds": t.transport_seconds,
        "exposed_seconds": t.exposed_seconds,
        "codec_seconds_per_step": (t.encode_seconds + t.decode_seconds) / steps,
        "encode_seconds_per_step": t.encode_seconds / steps,
        "decode_seconds_per_step": t.decode_seconds / steps,
        "transport_seconds_per_step": t.transport_seconds / steps,
        "exposed_seconds_per_step": t.exposed_seconds / steps,
        "relative_error": math.sqrt(_quotient(t.error_squares, t.signal_squares)),
        "parameters": {name: _row(ParameterTotals(**row)) for name, row in state["parameters"].items()},
    }


def _row(row: ParameterTotals) -> dict[str, Any]:
    return {
        "values_sent": row.values_sent,
        "wire_bytes_apportioned": row.wire_bytes,
        "bits_per_value": _quotient(8 * row.wire_bytes, row.values_sent),
        "entropy_sampled": row.entropy_values > 0,
        "order0_bits": _quotient(row.order0_bits, row.entropy_values),
        "model_bits": _quotient(row.model_bits, row.entropy_values),
        "error_sampled": row.signal_squares > 0.0,
        "relative_error": math.sqrt(_quotient(row.error_squares, row.signal_squares)),
    }


def _quotient(a: float, b: float, otherwise: float = 0.0) -> float:
    return a / b if b else otherwise
