"""Which compression pays here, if any: a pure function of measurements, with its prediction and its reason.

A step is predicted from two resources that work side by side, the processor and the link. With K the processor's
seconds (forward, backward, DDP's copies of gradients), x the link's seconds for all bytes, rᵢ the share of K after
which bucket i is there, vᵢ the share of all values in it and the later ones, and c what nothing hides, the messages'
latencies and the codec:

    step = c + max over buckets of (rᵢ K + vᵢ x)

From some bucket on the link is busy without a pause; of the last one, rᵢ = 1. exposed = step − backward.

Where codec and backward share a core, c has all of the codec's time: while backward runs it makes that longer, and
later the link waits for it or it for the link, whatever the number of buckets (tests/unit/simulated_step.py). Where the
codec has a core to itself, c has the last bucket's, and K is the codec's time for the others if that is longer.

Bytes that a rank sends, of V values at b bytes on n ranks:
    native      2 (n − 1) / n · V · itemsize, by torch's all-reduce as measured
    flat        2 (n − 1) / n · V · b         (exchange and gather), by our transport as measured
    one way     half of either, where gradients travel to the ranks that keep their sums, and not back (FSDP2, ZeRO)
    groups      as flat; the packets that every rank gets of the results are passed on inside of a group
    hierarchy   2 (N − 1) / N · V / l · b     between N nodes of l ranks; inside of them 2 (l − 1) / l · V · itemsize
Codec seconds: all values are encoded once, and (2 n − 1) / n of them decoded (V / l values, N for n, in a hierarchy);
one way (n − 1) / n of them are encoded and as many decoded. Every packet costs its header and calls beside: with many
ranks shards become small, and that is what ends the one-shot exchange (benchmarks/scaling.py). A flat reduction sends 2
(n − 1) messages a rank and bucket, groups of g 2 (g + n / g − 2), and as many fewer packets on the way up; a message's
latency is that of our exchange divided by its n − 1.

The rule: of all choices within `tolerance` of the fastest one, the least compressing. So nothing is chosen that is
predicted to be slower than the native all-reduce, and native wins ties.

Why this form of a step: with the same K, rᵢ and vᵢ for all choices, what one of fewer bytes saves of the maximum only
shrinks as the link gets faster, while the difference of their c stays. With buckets of a given size a faster link can
then never lead to more compression, nor a slower codec to leave the native all-reduce; tests hold both
(tests/unit/test_planner.py).
A hierarchy against a flat reduction is another question: where a link is so fast
that the hierarchy no longer pays, each rank sends more bytes, and more compression can pay again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.routes import (
    PlannerOptions,
    Route,
    Shapes,
    all_routes,
    bits_of,
    bucket_numels,
    codec_bits,
    native_route,
)
from efficient_dl.errors import ConfigError

__all__ = [
    "DEFAULT_FLOOR_BITS",
    "Decision",
    "PlannerOptions",
    "Prediction",
    "Shapes",
    "bits_of",
    "bucket_numels",
    "codec_bits",
    "plan_for",
    "predict",
    "wording",
]

DEFAULT_FLOOR_BITS = 2.0  # docs/experiments.md: within 1.5 % of fp32's loss at 500 steps, 0.3 % at 2,000
_BUCKET_CHOICES = (1 << 20, 4 << 20, 10 << 20, 25 << 20)
_SLOWEST, _FASTEST = 1e3, 1e13  # bytes per second; no break-even is looked for beyond


@dataclass(frozen=True)
class Prediction:
    """One choice, and the step it leads to.

    bits: as `compress` takes it. transfer_seconds: the link's, of all bytes that one rank sends (sent_bytes).
    exposed_seconds: what a step takes longer than backward alone.
    break_even: bytes per second of the slowest link below which this beats the native all-reduce; 0.0: never,
        inf: on every link.
    group_size: of how many ranks each group is, where they reduce in groups; else 0.
    bounded_seconds: the step's with bounded messages; 0.0: they are not possible, or not allowed.
    """

    bits: str
    hierarchy: bool
    step_seconds: float
    exposed_seconds: float
    codec_seconds: float
    transfer_seconds: float
    sent_bytes: float
    break_even: float
    group_size: int = 0
    bounded_seconds: float = 0.0

    @property
    def plan(self) -> tuple[str, bool, int]:
        """What tells choices apart: bits, hierarchy, group_size."""
        return self.bits, self.hierarchy, self.group_size


@dataclass(frozen=True)
class Decision:
    """What `plan_for` chose, and why.

    bits: as `compress` takes it: "none" steps aside. predictions: of every choice, the least compressing first.
    bucket_bytes: for DistributedDataParallel's bucket_cap_mb; 0: torch's own buckets are within the tolerance.
    bounded: whether messages' sizes follow from the plan; where exact ones take longer by more than the tolerance.
    """

    bits: str
    hierarchy: bool
    bucket_bytes: int
    reason: str
    predictions: tuple[Prediction, ...]
    group_size: int = 0
    bounded: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; a break-even that is infinite is None."""
        values = asdict(self)
        for one in values["predictions"]:
            one["break_even"] = one["break_even"] if math.isfinite(one["break_even"]) else None
        return values | {"predictions": list(values["predictions"])}

    @property
    def plan(self) -> tuple[str, bool, int]:
        """What tells choices apart: bits, hierarchy, group_size."""
        return self.bits, self.hierarchy, self.group_size

    @property
    def chosen(self) -> Prediction:
        """The prediction of the choice, with torch's own buckets."""
        return next(one for one in self.predictions if one.plan == self.plan)


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
    bounded = 0 < chosen.bounded_seconds * (1 + options.tolerance) < chosen.step_seconds
    decision = Decision(
        chosen.bits, chosen.hierarchy, bucket_bytes, "", predictions, chosen.group_size, bounded
    )
    return replace(decision, reason=_reason(decision, measurements, floor_bits))


def predict(
    measurements: Measurements,
    model: Shapes,
    floor_bits: float = DEFAULT_FLOOR_BITS,
    options: PlannerOptions | None = None,
) -> tuple[Prediction, ...]:
    """Every choice that the floor and the options allow, the least compressing first."""
    options = options or PlannerOptions()
    native = native_route(measurements, model, options)
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
            one.group_size,
            one.bounded.step_seconds() if one.bounded else 0.0,
        )
        for one in all_routes(measurements, model, floor_bits, options)
    )


def _break_even(one: Route, native: Route, speed: float) -> float:
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
            for one in all_routes(measurements, model, floor_bits, replace(options, bucket_bytes=size))
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
    why += _messages(chosen, measurements)
    if decision.bounded:
        why += f"; with bounded messages {_ms(chosen.bounded_seconds)}, as no sizes are told"
    assumed = f"; {measurements.assumed}" if measurements.assumed else ""
    fed = "; lossy codecs were timed with error feedback" if measurements.feeds_back else ""
    return (
        f"{wording(chosen)}: a step of {_ms(chosen.step_seconds)} is predicted ({others}); the links have {speed}, "
        f"{why}; {known}{fed}; the floor is {floor_bits:g} bits{assumed}"
    )


def _messages(chosen: Prediction, measurements: Measurements) -> str:
    """Why groups, if they were chosen."""
    if not chosen.group_size:
        return ""
    ranks, size = measurements.world_size, chosen.group_size
    return (
        f"; groups of {size} need {2 * (size + ranks // size - 2)} messages a rank and bucket instead of "
        f"{2 * (ranks - 1)}, and round a value three times instead of twice"
    )


def wording(one: Prediction) -> str:
    """A choice in a few words."""
    name = {"none": "native", "lossless": "lossless"}.get(one.bits, f"{one.bits} bits")
    if one.group_size:
        return f"{name} in groups of {one.group_size}"
    return f"{name} between nodes" if one.hierarchy else name


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds:,.0f} ms"


def _mbits(bytes_per_second: float) -> str:
    megabits = 8 * bytes_per_second / 1e6
    return f"{megabits:.3g} Mbit/s" if megabits < 999.5 else f"{megabits / 1000:.3g} Gbit/s"
