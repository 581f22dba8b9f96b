"""Says, once under each plan, that compression costs more time than it saves, or errs more than it should."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from efficient_dl.comm.compressor import SAMPLE_EVERY_STEPS
from efficient_dl.comm.layout import BLOCK_NUMEL
from efficient_dl.comm.meter import Meter, Totals, combined, since, summary
from efficient_dl.errors import ConfigError

OnAlarm = Literal["warn", "disable"]
WINDOW_STEPS = SAMPLE_EVERY_STEPS  # each window has one step whose packets were measured for their error
ERROR_OF_SENDING_NOTHING = 1.0  # whoever errs more would do better with zeros
_UNUSUAL_SHARE = (
    0.02  # of escapes among values, or dropped among blocks; at 0.1 … 7 bits real gradients have < 0.0003
)
_NOTICEABLE_SHARE = 0.05  # of a step's time


@dataclass(frozen=True)
class Alarm:
    """One thing that is not as it should be. kind: "cost", "error", "escapes", "nonfinite" or "dropped".

    plan: the one in force, where a run has several, else "".
    """

    kind: str
    step: int
    text: str
    plan: str = ""


class Watch:
    """Looks at a rank's meter, at what the steps of a window alone have added to it.

    meter: of this rank; several, of the same parameters, are looked at as one, and steps are the first one's.
    max_relative_error: the largest error, of all sampled packets and of each parameter, before an alarm; None: 1.0.
    times: whether the meter's seconds are those of real transfers (not in the shadow, not of the yardstick).
    exact: whether the codec is; then only times are watched.
    escapes_are_usual: for "grid:RATE", whose one step for all values leaves many outside of its alphabet at high rates.
    what: is encoded, for the texts. plan: in force, where a run has several; a kind is raised once under each.

    Errors are watched by each rank alone, in windows of `WINDOW_STEPS` steps (`stepped`). Times tell something only
    together: all ranks exchange theirs when they compare their parameters (`notes`, `judge`), and come to the same
    result. The first window of times has everything that happens once, and is not judged.
    """

    def __init__(
        self,
        meter: Meter | Sequence[Meter],
        max_relative_error: float | None,
        *,
        times: bool,
        exact: bool,
        escapes_are_usual: bool = False,
        what: str = "gradients",
        plan: str = "",
    ) -> None:
        self.alarms: list[Alarm] = []
        self._plan = plan
        self._meters = [meter] if isinstance(meter, Meter) else list(meter)
        self._what = what
        self._limit = ERROR_OF_SENDING_NOTHING if max_relative_error is None else max_relative_error
        self._times, self._exact = times, exact
        self._escapes_are_usual = escapes_are_usual
        self._begin_errors()
        self._begin_times()
        self._warm = False

    def stepped(self) -> list[Alarm]:
        """Looks at the errors after a step; returns the alarms that are new."""
        self._steps += 1
        encoded, nonfinite = self._counts()
        self._measured_steps += (
            encoded > self._encoded
        )  # with bounded messages on a GPU not every step's packets are
        self._nonfinite_steps += nonfinite > self._nonfinite
        self._encoded, self._nonfinite = encoded, nonfinite
        if self._exact or self._steps < WINDOW_STEPS:
            return []
        found = errs_too_much(since(self._state(), self._before), self._limit, self._what)
        if self._escapes_are_usual:
            found["escapes"] = None
        found["nonfinite"] = never_finite(self._nonfinite_steps, self._measured_steps, self._what)
        self._begin_errors()
        return self._raise(found)

    def notes(self) -> list[int]:
        """This rank's part of the window's times, for `judge`: as many numbers on every rank."""
        if not self._times:
            return []
        now, before = self._sums(), self._totals
        sent = now.wire_bytes - now.native_bytes - (before.wire_bytes - before.native_bytes)
        seconds = (
            sent * median_seconds_a_byte([one for meter in self._meters for one in meter.transfers]),
            now.encode_seconds + now.decode_seconds - before.encode_seconds - before.decode_seconds,
            now.exposed_seconds - before.exposed_seconds,
            time.perf_counter() - self._start,
        )
        saved = now.raw_bytes - now.wire_bytes - (before.raw_bytes - before.wire_bytes)
        return [sent, saved, *(round(1e9 * one) for one in seconds)]

    def judge(self, notes: list[list[int]]) -> list[Alarm]:
        """Looks at the times of all ranks, given their `notes`; the same result on all ranks."""
        steps = self._meters[0].steps - self._first
        if not self._times or steps < WINDOW_STEPS:
            return []
        warm, self._warm = self._warm, True
        self._begin_times()
        if not warm:
            return []
        mean = [sum(column) / len(notes) / steps for column in zip(*notes, strict=True)]
        return self._raise({"cost": Costs(mean[0], mean[1], *(one / 1e9 for one in mean[2:])).verdict()})

    def state_dict(self) -> list[dict[str, Any]]:
        """The alarms so far, which are not raised again under the same plan."""
        return [asdict(alarm) for alarm in self.alarms]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continues after the alarms of a `state_dict`, with the meter's present counts."""
        self.alarms = [Alarm(**alarm) for alarm in state]
        self._begin_errors()
        self._begin_times()
        self._warm = False

    def _raise(self, found: Mapping[str, str | None]) -> list[Alarm]:
        known = {alarm.kind for alarm in self.alarms if alarm.plan == self._plan}
        new = [
            Alarm(kind, self._meters[0].steps, text, self._plan)
            for kind, text in found.items()
            if text and kind not in known
        ]
        self.alarms += new
        return new

    def _begin_errors(self) -> None:
        self._before = self._state()
        self._steps = self._measured_steps = self._nonfinite_steps = 0
        self._encoded, self._nonfinite = self._counts()

    def _begin_times(self) -> None:
        self._first = self._meters[0].steps
        self._totals = self._sums()
        for meter in self._meters:
            meter.transfers.clear()
        self._start = time.perf_counter()

    def _state(self) -> dict[str, Any]:
        return combined([meter.state_dict() for meter in self._meters])

    def _sums(self) -> Totals:
        sums = Totals()
        for meter in self._meters:
            sums.add(meter.totals)
        return sums

    def _counts(self) -> tuple[int, int]:
        """Values whose packets were measured, and blocks that are not finite."""
        sums = self._sums()
        return sums.encoded_values, sums.nonfinite_blocks


def check_options(max_relative_error: float | None, on_alarm: str) -> None:
    """Raises ConfigError for what `compress` cannot take."""
    if max_relative_error is not None and not max_relative_error > 0:
        raise ConfigError(
            "max_relative_error must be positive", expected="such as 0.5", found=str(max_relative_error)
        )
    if on_alarm not in ("warn", "disable"):
        raise ConfigError(f"unknown on_alarm {on_alarm!r}", expected='"warn" or "disable"')


@dataclass(frozen=True)
class Costs:
    """What a step costs with compression, as the mean of all ranks and of some steps.

    sent_bytes, saved_bytes: by our collectives, and less than with the identity codec. transfer_seconds: what the bytes
    sent take; codec_seconds: encoding and decoding; exposed_seconds: how long a step waits for its last buckets.
    """

    sent_bytes: float
    saved_bytes: float
    transfer_seconds: float
    codec_seconds: float
    exposed_seconds: float
    step_seconds: float

    def verdict(self) -> str | None:
        """Why compression makes these steps slower, or None.

        saved = saved bytes × transfer seconds / sent bytes: what the bytes saved would have taken at the speed at which
        those sent have moved. Without compression the codec's seconds go and these come back, but a step cannot get
        faster than by what it waits for now, so

            loss = min(exposed, codec − saved),

        and an alarm needs a loss of 5 % of the step. Who waits for a late rank sees a slow line, and the late rank a
        fast one: hence the mean over ranks of each rank's median transfer. What skew remains makes the line look slower
        than it is, and so does the exchange of one bucket beside the gathering of another: the loss is underestimated.
        """
        if self.sent_bytes <= 0 or self.transfer_seconds <= 0.0:
            return None
        speed = self.sent_bytes / self.transfer_seconds
        saved = self.saved_bytes / speed
        loss = min(self.exposed_seconds, self.codec_seconds - saved)
        if loss < _NOTICEABLE_SHARE * self.step_seconds:
            return None
        break_even = max(self.saved_bytes, 0.0) / self.codec_seconds
        return (
            f"compression costs more time than it saves: the codec takes {_ms(self.codec_seconds)} a step, and sends "
            f"{self.saved_bytes / 1e6:.3g} MB a step less, worth {_ms(saved)} at the measured {_mbits(speed)} (it pays "
            f"below {_mbits(break_even)}); a step of {_ms(self.step_seconds)} waits {_ms(self.exposed_seconds)} for it."
            ' Fix: bits="none" on this network; or a larger batch, or more threads for the codec (OMP_NUM_THREADS)'
        )


def median_seconds_a_byte(transfers: list[tuple[int, float]]) -> float:
    """Half of all bytes went faster, half slower."""
    rates = sorted((seconds / max(num_bytes, 1), num_bytes) for num_bytes, seconds in transfers)
    half, passed = sum(num_bytes for _, num_bytes in rates) / 2, 0
    for rate, num_bytes in rates:
        passed += num_bytes
        if passed >= half:
            return rate
    return 0.0


def errs_too_much(window: Mapping[str, Any], limit: float, what: str = "gradients") -> dict[str, str | None]:
    """By kind of alarm: what is unusual in the errors of a window of a `Meter`, or None."""
    found = summary(window)
    errors = {name: row["relative_error"] for name, row in found["parameters"].items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    fix = "Fix: more bits, a larger batch, or a larger max_relative_error"
    error = None
    if found["relative_error"] > limit:
        error = f"the {what}' relative error is {found['relative_error']:.3g}, over the limit of {limit:.3g}. {fix}"
    elif errors and errors[worst] > limit:
        error = (
            f"the relative error of {worst!r} is {errors[worst]:.3g}, over the limit of {limit:.3g}. {fix}"
        )
    values = max(found["encoded_values"], 1)
    return {
        "error": error,
        "escapes": _unusual(found["escapes"], values, "values lie outside of the code's range"),
        "dropped": _unusual(
            window["totals"]["dropped_blocks"],  # of the same packets as the values
            values // BLOCK_NUMEL + 1,
            "blocks did not fit their packets and were zeroed",
        ),
    }


def never_finite(nonfinite_steps: int, steps: int, what: str = "gradients") -> str | None:
    """An alarm when most steps had a gradient that is not finite: more than a scaler that looks for its scale."""
    if 2 * nonfinite_steps <= steps:
        return None
    return (
        f"{nonfinite_steps} of {steps} steps had {what} that are not finite: training has diverged, or the loss "
        "scale is too large. Fix: go back to a checkpoint; shadow=True applies the uncompressed gradients, to compare"
    )


def _unusual(count: int, of: int, what: str) -> str | None:
    if count <= _UNUSUAL_SHARE * of:
        return None
    return f"{100 * count / of:.3g} % of the {what}, usual is less than 0.1 %. Fix: more bits, or bits='lossless'"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _mbits(bytes_per_second: float) -> str:
    return f"{8 * bytes_per_second / 1e6:.3g} Mbit/s"
