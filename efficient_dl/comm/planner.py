"""Which compression pays here, if any: a pure function of measurements, with its prediction and its reason.

A step is predicted from two resources that work side by side, the processor and the link. With K the processor's
seconds (backward, what of the codec is not hidden, and the messages' latencies), x the link's seconds for all bytes, α
the first bucket's share of all values and β the last one's:

    step = max(K + β x, α K + x)

Either the processor is the bottleneck and the last bucket's transfer follows, or the link is, which can begin when the
first bucket is ready. exposed = step − backward.

Bytes that a rank sends, of V values at b bytes on n ranks:
    native      2 (n − 1) / n · V · itemsize, by torch's all-reduce as measured
    flat        2 (n − 1) / n · V · b         (exchange and gather), by our transport as measured
    one way     half of either, where gradients travel to the ranks that keep their sums, and not back (FSDP2, ZeRO)
    hierarchy   2 (N − 1) / N · V / l · b     between N nodes of l ranks; inside of them 2 (l − 1) / l · V · itemsize
Codec seconds: all values are encoded once, and (2 n − 1) / n of them decoded (V / l values, N for n, in a hierarchy);
one way (n − 1) / n of them are encoded and as many decoded. Every packet costs its header and calls beside: with many
ranks shards become small, and that is what ends the one-shot exchange (benchmarks/scaling.py).

The rule: of all choices within `tolerance` of the fastest one, the least compressing. So nothing is chosen that is
predicted to be slower than the native all-reduce, and native wins ties.

Why this form of a step: it is homogeneous in (K, x), so that T1 / T2 of two choices is monotone in the link's speed.
A faster link can then never lead to more compression, nor a slower codec to leave the native all-reduce; tests hold
both (tests/unit/test_planner.py). A hierarchy against a flat reduction is another question: where a link is so fast
that the hierarchy no longer pays, each rank sends more bytes, and more compression can pay again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from efficient_dl.comm.measurements import CodecSpeed, Measurements
from efficient_dl.errors import ConfigError

DEFAULT_FLOOR_BITS = 2.0  # docs/experiments.md: within 1.5 % of fp32's loss at 500 steps, 0.3 % at 2,000
FIRST_BUCKET_BYTES = 1 << 20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
BUCKET_BYTES = 25 << 20  # DistributedDataParallel's own bucket_cap_mb
_BUCKET_CHOICES = (1 << 20, 4 << 20, 10 << 20, 25 << 20)
_SLOWEST, _FASTEST = 1e3, 1e13  # bytes per second; no break-even is looked for beyond


@dataclass(frozen=True)
class PlannerOptions:
    """What the user allows.

    tolerance: how much slower than the fastest choice one with less compression may be; 0.02 is 2 %.
    bucket_bytes: of DistributedDataParallel; 0: its own 25 MiB, the first one 1 MiB.
    flat, hierarchy: which of our reductions can be had; a hierarchy only where nodes have several ranks each.
    native: whether torch's own all-reduce can be had.
    one_way, native_one_way: whether gradients travel to the ranks that keep their sums, and not back: ours, torch's.
    """

    tolerance: float = 0.02
    bucket_bytes: int = 0
    flat: bool = True
    hierarchy: bool = False
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


@dataclass(frozen=True)
class Prediction:
    """One choice, and the step it leads to.

    bits: as `compress` takes it. transfer_seconds: the link's, of all bytes that one rank sends (sent_bytes).
    exposed_seconds: what a step takes longer than backward alone.
    break_even: bytes per second of the slowest link below which this beats the native all-reduce; 0.0: never,
        inf: on every link.
    """

    bits: str
    hierarchy: bool
    step_seconds: float
    exposed_seconds: float
    codec_seconds: float
    transfer_seconds: float
    sent_bytes: float
    break_even: float


@dataclass(frozen=True)
class Decision:
    """What `plan_for` chose, and why.

    bits: as `compress` takes it: "none" steps aside. predictions: of every choice, the least compressing first.
    bucket_bytes: for DistributedDataParallel's bucket_cap_mb; 0: torch's own buckets are within the tolerance.
    """

    bits: str
    hierarchy: bool
    bucket_bytes: int
    reason: str
    predictions: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; a break-even that is infinite is None."""
        values = asdict(self)
        for one in values["predictions"]:
            one["break_even"] = one["break_even"] if math.isfinite(one["break_even"]) else None
        return values | {"predictions": list(values["predictions"])}

    @property
    def chosen(self) -> Prediction:
        """The prediction of the choice, with torch's own buckets."""
        return next(
            one for one in self.predictions if (one.bits, one.hierarchy) == (self.bits, self.hierarchy)
        )


def plan_for(
    measurements: Measurements,
    model: Shapes,
    floor_bits: float = DEFAULT_FLOOR_BITS,
    options: PlannerOptions | None = None,
) -> Decision:
    """Chooses; the same for the same arguments, to the last bit.

    floor_bits: the fewest bits a value that may be chosen, whatever that costs: the quality that the user insists on.
    Raises ConfigError if the options and the floor leave no choice.
    """
    options = options or PlannerOptions()
    if measurements.world_size == 1 or model.numel == 0:
        alone = Prediction("none", False, measurements.backward_seconds, 0.0, 0.0, 0.0, 0.0, math.inf)
        return Decision("none", False, 0, "one rank has nothing to send", (alone,))
    predictions = predict(measurements, model, floor_bits, options)
    if not predictions:
        raise ConfigError(
            "there is nothing to choose from",
            expected=f"the native all-reduce, or a measured codec of at least {floor_bits:g} bits",
            found=", ".join(one.codec for one in measurements.codecs) or "no codec",
            fix="lower the floor, or name the bits yourself",
        )
    best = min(one.step_seconds for one in predictions)
    limit = best * (1 + options.tolerance)
    chosen = next(one for one in predictions if one.step_seconds <= limit)
    bucket_bytes = _buckets(measurements, model, floor_bits, options, chosen)
    decision = Decision(chosen.bits, chosen.hierarchy, bucket_bytes, "", predictions)
    return replace(decision, reason=_reason(decision, measurements, floor_bits))


def bucket_numels(numels: Sequence[int], itemsize: int = 4, bucket_bytes: int = 0) -> list[int]:
    """Values of each of DistributedDataParallel's buckets: filled from the last parameter to the first.

    bucket_bytes: 0: DDP's own, the first one of 1 MiB and the others of 25 MiB.
    """
    return list(_buckets_of(tuple(numels), itemsize, bucket_bytes))


@lru_cache(maxsize=256)
def _buckets_of(numels: tuple[int, ...], itemsize: int, bucket_bytes: int) -> tuple[int, ...]:
    buckets: list[int] = [0]
    for numel in reversed(numels):
        first = len(buckets) == 1 and not bucket_bytes
        if buckets[-1] * itemsize >= (FIRST_BUCKET_BYTES if first else bucket_bytes or BUCKET_BYTES):
            buckets.append(0)
        buckets[-1] += numel
    return tuple(buckets)


def _routes(
    measurements: Measurements, model: Shapes, floor_bits: float, options: PlannerOptions
) -> list[_Route]:
    """Every choice that is allowed, the least compressing first; for each codec the faster one of the reductions."""
    allowed = [one for one in measurements.codecs if codec_bits(one.codec) >= floor_bits]
    choices = [_native(measurements, model, options)] if options.native else []
    for codec in sorted(allowed, key=lambda one: -one.bytes_per_value):
        both: list[_Route] = []
        if options.flat:
            both.append(_flat(measurements, model, codec, options))
        if options.hierarchy and measurements.between is not None:
            both.append(_hierarchical(measurements, model, codec, options))
        if both:
            choices.append(min(both, key=lambda one: one.step_seconds()))
    return choices


def predict(
    measurements: Measurements,
    model: Shapes,
    floor_bits: float = DEFAULT_FLOOR_BITS,
    options: PlannerOptions | None = None,
) -> tuple[Prediction, ...]:
    """Every choice that the floor and the options allow, the least compressing first."""
    options = options or PlannerOptions()
    native = _native(measurements, model, options)
    return tuple(
        Prediction(
            one.bits,
            one.hierarchy,
            one.step_seconds(),
            one.step_seconds() - measurements.backward_seconds,
            one.codec_seconds,
            one.transfer_seconds,
            one.sent_bytes,
            math.inf if one.bits == "none" else _break_even(one, native, measurements.slowest_link),
        )
        for one in _routes(measurements, model, floor_bits, options)
    )


def codec_bits(codec: str) -> float:
    """The bits a value of a codec with a rate ("bits:2.0", "grid:0.5"); inf of an exact one."""
    rate = codec.partition(":")[2]
    return float(rate) if rate else math.inf


def bits_of(codec: str) -> str:
    """What `compress(bits=...)` takes for a codec: "2.0" of "bits:2.0", "lossless" of "lossless"."""
    return codec.partition(":")[2] or codec


@dataclass(frozen=True)
class _Route:
    """One choice's part in the formula of the file's first lines: K, x, α and β."""

    bits: str
    hierarchy: bool
    codec_seconds: float
    sent_bytes: float
    processor_seconds: float
    transfer_seconds: float
    first: float
    last: float

    def step_seconds(self, factor: float = 1.0) -> float:
        """The prediction if the links between nodes were so many times as fast."""
        transfer = self.transfer_seconds / factor
        return max(
            self.processor_seconds + self.last * transfer, self.first * self.processor_seconds + transfer
        )


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
) -> _Route:
    """speed: bytes per second. bucket_seconds: what each bucket takes whatever its size.

    packets: how many a rank encodes, decodes and sends for each bucket.
    """
    buckets = _buckets_of(model.numels, model.itemsize, options.bucket_bytes)
    first, last = buckets[0] / model.numel, buckets[-1] / model.numel
    backward = measurements.backward_seconds
    encoded, decoded, sent = packets
    cost = measurements.packet
    sent_bytes += len(buckets) * sent * cost.num_bytes
    codec_seconds += len(buckets) * (encoded * cost.encode_seconds + decoded * cost.decode_seconds)
    if measurements.contended:
        processor = backward + codec_seconds
    else:
        processor = max(backward, (1 - last) * codec_seconds) + last * codec_seconds
    processor += bucket_seconds * len(buckets)
    return _Route(bits, hierarchy, codec_seconds, sent_bytes, processor, sent_bytes / speed, first, last)


def _native(measurements: Measurements, model: Shapes, options: PlannerOptions) -> _Route:
    ranks, line = measurements.world_size, measurements.native
    ways = 1 if options.native_one_way else 2
    sent = ways * (ranks - 1) / ranks * model.numel * model.itemsize
    return _route(
        measurements, model, options, "none", sent, line.bytes_per_second, 0.0, line.latency_seconds
    )


def _flat(measurements: Measurements, model: Shapes, codec: CodecSpeed, options: PlannerOptions) -> _Route:
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
    )


def _hierarchical(
    measurements: Measurements, model: Shapes, codec: CodecSpeed, options: PlannerOptions
) -> _Route:
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


def _packets(ranks: int, ways: int) -> tuple[int, int, int]:
    """Of a bucket, per rank: encoded, decoded, sent. On the way back one packet goes to all."""
    others = ranks - 1
    return (others + (ways == 2), ways * others + (ways == 2), ways * others)


def _break_even(one: _Route, native: _Route, speed: float) -> float:
    """Bisection; by the monotony of T1 / T2 there is one change of sign at most. 0.0 also if it pays above it."""

    def pays(logarithm: float) -> bool:
        factor = math.exp(logarithm)
        return one.step_seconds(factor) < native.step_seconds(factor)

    low, high = math.log(_SLOWEST / speed), math.log(_FASTEST / speed)
    if pays(high):
        return math.inf if pays(low) else 0.0
    if not pays(low):
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return speed * math.exp(low)


def _buckets(
    measurements: Measurements, model: Shapes, floor_bits: float, options: PlannerOptions, chosen: Prediction
) -> int:
    """Buckets that make the chosen step shorter by more than the tolerance; 0 if none do, or if they are given."""
    if options.bucket_bytes:
        return options.bucket_bytes
    seconds: Mapping[int, float] = {
        size: next(
            one.step_seconds()
            for one in _routes(measurements, model, floor_bits, replace(options, bucket_bytes=size))
            if one.bits == chosen.bits
        )
        for size in _BUCKET_CHOICES
    }
    best = min(seconds, key=lambda size: (seconds[size], -size))
    return best if seconds[best] * (1 + options.tolerance) < chosen.step_seconds else 0


def _reason(decision: Decision, measurements: Measurements, floor_bits: float) -> str:
    chosen = decision.chosen
    others = ", ".join(
        f"{wording(one)} {_ms(one.step_seconds)}" for one in decision.predictions if one is not chosen
    )
    speed = _mbits(measurements.slowest_link)
    known = (
        f"backward takes {_ms(measurements.backward_seconds)}"
        if measurements.backward_seconds
        else "backward was not measured, so nothing is taken to hide behind it"
    )
    if chosen.bits == "none":
        pays = max((one.break_even for one in decision.predictions if one.bits != "none"), default=0.0)
        why = (
            f"compression would begin to pay below {_mbits(pays)}"
            if 0 < pays < math.inf
            else "no codec is fast enough to pay on any link"
            if pays == 0
            else "none gains more than the tolerance"
        )
    else:
        why = (
            "it pays on every link"
            if chosen.break_even == math.inf
            else f"it pays below {_mbits(chosen.break_even)}"
        )
    assumed = f"; {measurements.assumed}" if measurements.assumed else ""
    return (
        f"{wording(chosen)}: a step of {_ms(chosen.step_seconds)} is predicted ({others}); the links have {speed}, "
        f"{why}; {known}; the floor is {floor_bits:g} bits{assumed}"
    )


def wording(one: Prediction) -> str:
    """A choice in a few words."""
    name = {"none": "native", "lossless": "lossless"}.get(one.bits, f"{one.bits} bits")
    return f"{name} between nodes" if one.hierarchy else name


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds:,.0f} ms"


def _mbits(bytes_per_second: float) -> str:
    megabits = 8 * bytes_per_second / 1e6
    return f"{megabits:.3g} Mbit/s" if megabits < 999.5 else f"{megabits / 1000:.3g} Gbit/s"
