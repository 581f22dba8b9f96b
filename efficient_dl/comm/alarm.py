"""Says, once, that compression costs more time than it saves, or errs more than it should."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from efficient_dl.comm.compressor import SAMPLE_EVERY_STEPS
from efficient_dl.comm.layout import BLOCK_NUMEL
from efficient_dl.comm.meter import Meter, Totals, since, summary
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
    """One thing that is not as it should be. kind: "cost", "error", "escapes", "nonfinite" or "dropped"."""

    kind: str
    step: int
    text: str


class Watch:
    """Looks at a meter every `WINDOW_STEPS` steps, and at what these steps alone have added to it.

    meter: of this rank; the alarms are about this rank's packets and seconds.
    max_relative_error: the largest error, of all sampled packets and of each parameter, before an alarm; None: 1.0.
    times: whether the meter's seconds are those of real transfers (not in the shadow, not of the yardstick).
    exact: whether the codec is; then only times are watched.

    The first window has everything that happens once, and is not watched for its times.
    """

    def __init__(self, meter: Meter, max_relative_error: float | None, *, times: bool, exact: bool) -> None:
        self.alarms: list[Alarm] = []
        self._meter = meter
        self._limit = ERROR_OF_SENDING_NOTHING if max_relative_error is None else max_relative_error
        self._times, self._exact = times, exact
        self._windows = 0
        self._begin()

    def stepped(self) -> list[Alarm]:
        """Looks at the meter after a step; returns the alarms that are new."""
        self._steps += 1
        nonfinite = self._meter.totals.nonfinite_blocks
        self._nonfinite_steps += nonfinite > self._nonfinite
        self._nonfinite = nonfinite
        if self._steps < WINDOW_STEPS:
            return []
        window = since(self._meter.state_dict(), self._before)
        found: dict[str, str | None] = {}
        if self._times and self._windows > 0:
            found["cost"] = costs_more_than_it_saves(
                Totals(**window["totals"]), time.perf_counter() - self._start, self._steps
            )
        if not self._exact:
            found |= errs_too_much(window, self._limit)
            found["nonfinite"] = never_finite(self._nonfinite_steps, self._steps)
        self._windows += 1
        self._begin()
        known = {alarm.kind for alarm in self.alarms}
        new = [
            Alarm(kind, self._meter.steps, text) for kind, text in found.items() if text and kind not in known
        ]
        self.alarms += new
        return new

    def state_dict(self) -> list[dict[str, Any]]:
        """The alarms so far, which are not raised again."""
        return [asdict(alarm) for alarm in self.alarms]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continues after the alarms of a `state_dict`, with the meter's present counts."""
        self.alarms = [Alarm(**alarm) for alarm in state]
        self._windows = 0
        self._begin()

    def _begin(self) -> None:
        self._before = self._meter.state_dict()
        self._start = time.perf_counter()
        self._steps = self._nonfinite_steps = 0
        self._nonfinite = self._meter.totals.nonfinite_blocks


def check_options(max_relative_error: float | None, on_alarm: str) -> None:
    """Raises ConfigError for what `compress` cannot take."""
    if max_relative_error is not None and not max_relative_error > 0:
        raise ConfigError(
            "max_relative_error must be positive", expected="such as 0.5", found=str(max_relative_error)
        )
    if on_alarm not in ("warn", "disable"):
        raise ConfigError(f"unknown on_alarm {on_alarm!r}", expected='"warn" or "disable"')


def costs_more_than_it_saves(t: Totals, seconds: float, steps: int) -> str | None:
    """Why compression makes these steps slower, or None.

    t: what the steps added to the meter; seconds: how long they took altogether.

    saved = (raw − wire) / speed, speed = wire / transport seconds: what the bytes saved would have taken at the speed
    at which those sent have moved. Without compression the codec's seconds go and these come back, but a step cannot
    get faster than by what it waits for now, so

        loss = min(exposed, codec − saved).

    It is a lower bound: the transport's seconds include waiting for slower ranks, and the exchange of one bucket runs
    beside the gathering of another, both of which make the line look slower, and saving worth more, than it is.
    An alarm needs a loss of 5 % of the steps' time.
    """
    sent, saved_bytes = t.wire_bytes - t.native_bytes, t.raw_bytes - t.wire_bytes
    codec = t.encode_seconds + t.decode_seconds
    if sent <= 0 or t.transport_seconds <= 0.0 or seconds <= 0.0:
        return None
    speed = sent / t.transport_seconds
    saved = saved_bytes / speed
    loss = min(t.exposed_seconds, codec - saved)
    if loss < _NOTICEABLE_SHARE * seconds:
        return None
    pays = f"it pays below {_mbits(saved_bytes / codec)}" if saved_bytes > 0 else "it saves no bytes"
    return (
        f"compression costs more time than it saves: the codec takes {_ms(codec / steps)} a step, and sends "
        f"{saved_bytes / steps / 1e6:.3g} MB a step less, worth {_ms(saved / steps)} at the measured "
        f"{_mbits(speed)} ({pays}); a step of {_ms(seconds / steps)} waits {_ms(t.exposed_seconds / steps)} for it. "
        'Fix: bits="none" on this network; or a larger batch, or more threads for the codec (OMP_NUM_THREADS)'
    )


def errs_too_much(window: Mapping[str, Any], limit: float) -> dict[str, str | None]:
    """By kind of alarm: what is unusual in the errors of a window of a `Meter`, or None."""
    found = summary(window)
    errors = {name: row["relative_error"] for name, row in found["parameters"].items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    fix = "Fix: more bits, a larger batch, or a larger max_relative_error"
    error = None
    if found["relative_error"] > limit:
        error = f"the gradients' relative error is {found['relative_error']:.3g}, over the limit of {limit:.3g}. {fix}"
    elif errors and errors[worst] > limit:
        error = (
            f"the relative error of {worst!r} is {errors[worst]:.3g}, over the limit of {limit:.3g}. {fix}"
        )
    values = max(found["encoded_values"], 1)
    return {
        "error": error,
        "escapes": _unusual(found["escapes"], values, "values lie outside of the code's range"),
        "dropped": _unusual(
            found["dropped_blocks"],
            values // BLOCK_NUMEL + 1,
            "blocks did not fit their packets and were zeroed",
        ),
    }


def never_finite(nonfinite_steps: int, steps: int) -> str | None:
    """An alarm when most steps had a gradient that is not finite: more than a scaler that looks for its scale."""
    if 2 * nonfinite_steps <= steps:
        return None
    return (
        f"{nonfinite_steps} of {steps} steps had gradients that are not finite: training has diverged, or the loss "
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
