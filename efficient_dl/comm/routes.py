"""What each way to reduce gradients costs a step, by what was measured: native, flat, in groups, between nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from efficient_dl.comm.capacity import knows_capacity, largest_growth
from efficient_dl.comm.measurements import CodecSpeed, Measurements
from efficient_dl.comm.topology import group_sizes
from efficient_dl.errors import ConfigError

FIRST_BUCKET_BYTES = 1 << 20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
BUCKET_BYTES = 25 << 20  # DistributedDataParallel's own bucket_cap_mb
FORWARD_SHARE = 1 / 3  # of a step: twice as many multiplications follow in the backward pass


@dataclass(frozen=True)
class PlannerOptions:
    """What the user allows.

    tolerance: how much slower than the fastest choice one with less compression may be; 0.02 is 2 %.
    bucket_bytes: of DistributedDataParallel; 0: its own 25 MiB, the first one 1 MiB.
    flat, hierarchy: which of our reductions can be had; a hierarchy only where nodes have several ranks each.
    bounded: whether messages may have sizes that follow from the plan (capacity.py), where the codec allows it.
    groups: whether ranks may reduce in groups, where each has a node to itself, or where flat is not allowed.
        group_size: of how many; 0: what is fastest. Groups are chosen only where they are faster than our other
        reductions by more than the tolerance.
    native: whether torch's own all-reduce can be had.
    one_way, native_one_way: whether gradients travel to the ranks that keep their sums, and not back: ours, torch's.
    """

    tolerance: float = 0.02
    bucket_bytes: int = 0
    flat: bool = True
    hierarchy: bool = False
    bounded: bool = False
    groups: bool = False
    group_size: int = 0
    native: bool = True
    one_way: bool = False
    native_one_way: bool = False


@dataclass(frozen=True)
class Shapes:
    """What is reduced: the values of each parameter, in the model's order, and the bytes of one."""

    numels: tuple[int, ...]
    itemsize: int = 4

    @property
    def numel(self) -> int:
        """All values."""
        return sum(self.numels)


def bucket_numels(numels: Sequence[int], itemsize: int = 4, bucket_bytes: int = 0) -> list[int]:
    """Values of each of DistributedDataParallel's buckets: filled from the last parameter to the first.

    bucket_bytes: 0: DDP's own, the first one of 1 MiB and the others of 25 MiB.
    """
    return list(_buckets_of(tuple(numels), itemsize, bucket_bytes))


@lru_cache(maxsize=256)
def _buckets_of(numels: tuple[int, ...], itemsize: int, bucket_bytes: int) -> tuple[int, ...]:
    last_first = range(len(numels) - 1, -1, -1)
    members = _members(numels, last_first, itemsize, bucket_bytes)
    return tuple(sum(numels[index] for index in bucket) for bucket in members)


def _members(
    numels: Sequence[int], order: Iterable[int], itemsize: int, bucket_bytes: int
) -> list[list[int]]:
    """The parameters in each bucket, which fill in this order."""
    buckets: list[list[int]] = [[]]
    filled = 0
    for index in order:
        first = len(buckets) == 1 and not bucket_bytes
        if filled * itemsize >= (FIRST_BUCKET_BYTES if first else bucket_bytes or BUCKET_BYTES):
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += numels[index]
    return buckets


def gradual(numels: Sequence[int], begin: float) -> tuple[float, ...]:
    """Shares of a step after which each parameter's gradient is there, if they come evenly from `begin` on."""
    total, done = max(sum(numels), 1), 0
    shares: list[float] = []
    for numel in reversed(numels):
        done += numel
        shares.append(begin + (1 - begin) * done / total)
    return tuple(reversed(shares))


@lru_cache(maxsize=256)
def _stages(
    numels: tuple[int, ...], itemsize: int, bucket_bytes: int, ready: tuple[float, ...]
) -> tuple[tuple[float, float], ...]:
    """Of each bucket: the share of a step after which it is there, and the share of all values in it and after it."""
    stages: list[tuple[float, float]] = []
    latest, left, total = 0.0, sum(numels), sum(numels)
    arrival = sorted(
        range(len(numels) - 1, -1, -1), key=lambda index: ready[index]
    )  # as DDP rebuilds its buckets
    for bucket in _members(numels, arrival, itemsize, bucket_bytes):
        latest = max(latest, *(ready[index] for index in bucket))  # buckets leave in order
        stages.append((latest, left / total))
        left -= sum(numels[index] for index in bucket)
    return (*stages[:-1], (1.0, stages[-1][1]))  # the last one has nothing beside it


def codec_bits(codec: str) -> float:
    """The bits a value of a codec with a rate ("bits:2.0", "grid:0.5"); inf of an exact one."""
    rate = codec.partition(":")[2]
    return float(rate) if rate else math.inf


def bits_of(codec: str) -> str:
    """What `compress(bits=...)` takes for a codec: "2.0" of "bits:2.0", "lossless" of "lossless"."""
    return codec.partition(":")[2] or codec


def all_routes(
    measurements: Measurements, model: Shapes, floor_bits: float, options: PlannerOptions
) -> list[Route]:
    """Every choice that is allowed, the least compressing first; for each codec the fastest one of the reductions."""
    allowed = [one for one in measurements.codecs if codec_bits(one.codec) >= floor_bits]
    choices = [native_route(measurements, model, options)] if options.native else []
    for codec in sorted(allowed, key=lambda one: -one.bytes_per_value):
        if found := _fastest(measurements, model, codec, options):
            choices.append(found)
    return choices


@dataclass(frozen=True)
class Route:
    """One choice's part in a step's formula (see comm/planner.py): c, K, x, and (rᵢ, vᵢ) of each bucket.

    exposed_seconds: c, what nothing hides of the codec and the messages' latencies. processor_seconds: K.

    bounded: the same with messages whose sizes follow from the plan; None: not possible.
    """

    bits: str
    hierarchy: bool
    codec_seconds: float
    sent_bytes: float
    exposed_seconds: float
    processor_seconds: float
    transfer_seconds: float
    stages: tuple[tuple[float, float], ...]
    group_size: int = 0
    bounded: Route | None = None

    def step_seconds(self, factor: float = 1.0) -> float:
        """The prediction if the links between nodes were so many times as fast."""
        transfer = self.transfer_seconds / factor
        busy = max(ready * self.processor_seconds + left * transfer for ready, left in self.stages)
        return self.exposed_seconds + busy


def _route(
    measurements: Measurements,
    model: Shapes,
    options: PlannerOptions,
    bits: str,
    sent_bytes: float,
    speed: float,
    codec_seconds: float,
    bucket_seconds: float,
    hierarchy: bool = False,
    packets: tuple[int, int, int] = (0, 0, 0),
    group_size: int = 0,
    told: float = 0.0,
) -> Route:
    """speed: bytes per second. bucket_seconds: what each bucket takes whatever its size.

    packets: how many a rank encodes, decodes and sends for each bucket. told: how often sizes are told in a bucket, in
    units of an exchange among all; 0: never.
    """
    ready = measurements.ready or gradual(
        model.numels, FORWARD_SHARE if measurements.backward_seconds else 0.0
    )
    backward = measurements.backward_seconds + model.numel * measurements.copy_seconds
    if len(ready) != len(model.numels):
        raise ConfigError(
            "these measurements are of another model",
            expected=f"{len(model.numels)} parameters that are trained",
            found=f"times of {len(ready)} gradients",
            fix="measure again",
        )
    stages = _stages(model.numels, model.itemsize, options.bucket_bytes, ready)
    encoded, decoded, sent = packets
    cost = measurements.packet
    sent_bytes += len(stages) * sent * cost.num_bytes
    codec_seconds += len(stages) * (encoded * cost.encode_seconds + decoded * cost.decode_seconds)
    # Beside backward where a core is idle, but for the last bucket's.
    hidden = 0.0 if measurements.contended else (1 - stages[-1][1]) * codec_seconds
    exposed = codec_seconds - hidden + bucket_seconds * len(stages)
    route = Route(
        bits,
        hierarchy,
        codec_seconds,
        sent_bytes,
        exposed,
        max(backward, hidden),
        sent_bytes / speed,
        stages,
        group_size,
    )
    if not (options.bounded and told):
        return route
    grown = sent_bytes + largest_growth(sent_bytes, len(stages) * sent)
    silent = exposed - min(told * measurements.told_seconds, bucket_seconds) * len(stages)
    bounded = replace(route, sent_bytes=grown, transfer_seconds=grown / speed, exposed_seconds=silent)
    return replace(route, bounded=bounded)


def native_route(measurements: Measurements, model: Shapes, options: PlannerOptions) -> Route:
    """Torch's own all-reduce, or the half of it that goes one way."""
    ranks, line = measurements.world_size, measurements.native
    ways = 1 if options.native_one_way else 2
    sent = ways * (ranks - 1) / ranks * model.numel * model.itemsize
    return _route(
        measurements, model, options, "none", sent, line.bytes_per_second, 0.0, line.latency_seconds
    )


def _flat(measurements: Measurements, model: Shapes, codec: CodecSpeed, options: PlannerOptions) -> Route:
    ranks, line = measurements.world_size, measurements.exchange
    ways, others = (1 if options.one_way else 2), (ranks - 1) / ranks
    if options.one_way:
        coded = others * model.numel * (codec.encode_seconds + codec.decode_seconds)
    else:
        coded = model.numel * (codec.encode_seconds + (1 + others) * codec.decode_seconds)
    sent = ways * others * model.numel * codec.bytes_per_value
    return _route(
        measurements,
        model,
        options,
        bits_of(codec.codec),
        sent,
        line.bytes_per_second,
        coded,
        ways * line.latency_seconds,
        packets=_packets(ranks, ways),
        told=_told(codec, ways),
    )


def _hierarchical(
    measurements: Measurements, model: Shapes, codec: CodecSpeed, options: PlannerOptions
) -> Route:
    assert measurements.between is not None and measurements.inside is not None
    nodes, local = len(measurements.ranks_per_node), measurements.ranks_per_node[0]
    numel = model.numel / local
    coded = numel * (codec.encode_seconds + (2 - 1 / nodes) * codec.decode_seconds)
    # Inside of a node bytes are copied by the same processors: they count as the codec's time does.
    inside = 2 * (local - 1) / local * model.numel * model.itemsize / measurements.inside.bytes_per_second
    return _route(
        measurements,
        model,
        options,
        bits_of(codec.codec),
        2 * (nodes - 1) / nodes * numel * codec.bytes_per_value,
        measurements.between.bytes_per_second,
        coded + inside,
        2 * (measurements.between.latency_seconds + measurements.inside.latency_seconds),
        hierarchy=True,
        packets=_packets(nodes, 2),
    )


def _grouped(
    measurements: Measurements, model: Shapes, codec: CodecSpeed, options: PlannerOptions, size: int
) -> Route:
    """In groups of so many: values and bytes of the flat way, but fewer messages, and fewer packets on the way up."""
    ranks, line = measurements.world_size, measurements.exchange
    peers, others = size + ranks // size - 2, ranks - 1
    return _route(
        measurements,
        model,
        options,
        bits_of(codec.codec),
        2 * others / ranks * model.numel * codec.bytes_per_value,
        line.bytes_per_second,
        model.numel * (codec.encode_seconds + (1 + others / ranks) * codec.decode_seconds),
        2 * peers / others * line.latency_seconds,
        packets=(peers + 1, peers + ranks, peers + others),
        group_size=size,
        told=_told(codec, 2 * peers / others),
    )


def _fastest(
    measurements: Measurements, model: Shapes, codec: CodecSpeed, options: PlannerOptions
) -> Route | None:
    """The fastest one of our reductions with a codec; None if none is allowed."""
    ranks = measurements.world_size
    ways: list[Route] = []
    if options.flat:
        ways.append(_flat(measurements, model, codec, options))
    if options.hierarchy and measurements.between is not None:
        ways.append(_hierarchical(measurements, model, codec, options))
    if options.groups and (ranks == len(measurements.ranks_per_node) or not options.flat):
        sizes = [options.group_size] if options.group_size else group_sizes(ranks)
        groups = [_grouped(measurements, model, codec, options, size) for size in sizes]
        if best := min(groups, key=lambda one: one.step_seconds(), default=None):
            # A third rounding has to be worth it.
            limit = min((one.step_seconds() for one in ways), default=math.inf) / (1 + options.tolerance)
            if best.step_seconds() < limit:
                return best
    return min(ways, key=lambda one: one.step_seconds(), default=None)


def _told(codec: CodecSpeed, times: float) -> float:
    """How often sizes are told; 0.0 of a codec whose packets have no size that follows from the plan."""
    return times if knows_capacity(codec.codec) else 0.0


def _packets(ranks: int, ways: int) -> tuple[int, int, int]:
    """Of a bucket, per rank: encoded, decoded, sent. On the way back one packet goes to all."""
    others = ranks - 1
    return (others + (ways == 2), ways * others + (ways == 2), ways * others)
