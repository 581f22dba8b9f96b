"""Alarms: raised when the numbers of a window say so, once, and not before."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from efficient_dl.codec import PacketStats
from efficient_dl.comm import (
    BucketLayout,
    KillSwitch,
    Meter,
    Transport,
    Watch,
    check_equal,
    native_tally,
    since,
    summary,
)
from efficient_dl.comm.alarm import WINDOW_STEPS, Costs, check_options
from efficient_dl.comm.meter import Tally
from efficient_dl.errors import ConfigError
from tests.unit.ranks import on_ranks

# A step of 100 ms: 0.1 of 0.8 MB sent in 10 ms, the rest is worth 70 ms; the codec takes 30 ms.
PAYS = Costs(
    sent_bytes=1e5,
    saved_bytes=7e5,
    transfer_seconds=0.01,
    codec_seconds=0.03,
    exposed_seconds=0.02,
    step_seconds=0.1,
)


def verdict(**changes: float) -> str | None:
    return dataclasses.replace(PAYS, **changes).verdict()


def test_compression_that_pays_raises_no_alarm() -> None:
    assert verdict() is None


def test_a_codec_slower_than_the_line_raises_an_alarm_with_the_numbers() -> None:
    text = verdict(transfer_seconds=0.001)  # 100 MB/s: what is saved is worth 7 ms, the codec takes 30
    assert text is not None
    for part in ("the codec takes 30 ms a step", "0.7 MB a step less, worth 7 ms", "measured 800 Mbit/s"):
        assert part in text
    assert "it pays below 187 Mbit/s" in text
    assert "a step of 100 ms waits 20 ms for it" in text
    assert 'Fix: bits="none"' in text


def test_a_codec_hidden_behind_backward_costs_nothing() -> None:
    assert verdict(transfer_seconds=0.001, exposed_seconds=0.004) is None  # less than 5 % of the step
    assert verdict(transfer_seconds=0.001, exposed_seconds=0.006) is not None


def timed(meter: Meter, transfers: list[float]) -> None:
    """One step that waits 1 s for its codec, whose transfers take so many seconds."""
    for seconds in transfers:
        tally = Tally(BucketLayout.of(["a", "b"], [512, 512], 2))
        tally.sent(tally.layout.shards[0], packet_bytes=1000, raw_bytes=8000, copies=1)
        tally.totals.transport_seconds, tally.totals.encode_seconds = seconds, 1.0
        meter.add(tally)
    meter.stepped(1.0)


def judged(transfers: list[list[float]], num_windows: int = 2) -> list[list[str]]:
    """The alarms of several ranks whose steps have these transfers, by rank."""
    meters = [Meter(["a", "b"]) for _ in transfers]
    watches = [Watch(meter, None, times=True, exact=True) for meter in meters]
    alarms: list[list[str]] = [[] for _ in transfers]
    for _ in range(num_windows):
        for _ in range(WINDOW_STEPS):
            for meter, seconds in zip(meters, transfers, strict=True):
                timed(meter, seconds)
        notes = [watch.notes() for watch in watches]
        for found, watch in zip(alarms, watches, strict=True):
            found += [alarm.text for alarm in watch.judge(notes)]
    return alarms


def test_all_ranks_come_to_the_same_verdict_and_not_in_the_first_window() -> None:
    assert judged([[0.01], [0.01]], num_windows=1) == [[], []]
    first, second = judged([[0.01], [0.03]], num_windows=3)
    assert first == second
    (text,) = first
    assert "worth 140 ms at the measured 0.4 Mbit/s" in text  # 7000 bytes more, at 1000 in 20 ms


def test_a_rank_that_is_always_late_does_not_make_the_line_fast() -> None:
    assert judged([[0.0001], [0.4]]) == [[], []]


def test_a_transfer_that_waits_does_not_make_the_line_slow() -> None:
    assert judged([[0.01, 3.0, 0.01]] * 2) != [[], []]


def step(meter: Meter, error: float = 0.1, other: float = 0.1, **counts: int) -> None:
    """One step with two parameters of 512 values, their relative errors, and other counts of its packet."""
    layout = BucketLayout.of(["a", "b"], [512, 512], 1)
    tally = Tally(layout)
    tally.encoded(PacketStats(numel=1024, packet_bytes=256, **counts), seconds=0.0)
    tally.sent(layout.shards[0], packet_bytes=256, raw_bytes=4096, copies=1)
    tally.erred(layout.shards[0], [error**2, other**2], [1.0, 1.0])
    meter.add(tally)
    meter.stepped(0.0)


def alarms(
    limit: float | None = None, num_windows: int = 2, exact: bool = False, **step_options: float
) -> list[str]:
    meter = Meter(["a", "b"])
    watch = Watch(meter, limit, times=False, exact=exact)
    found = []
    for _ in range(num_windows * WINDOW_STEPS):
        step(meter, **step_options)  # type: ignore[arg-type]
        found += watch.stepped()
    return [f"{alarm.kind} at {alarm.step}: {alarm.text}" for alarm in found]


def test_usual_steps_raise_no_alarm() -> None:
    assert alarms() == []
    assert alarms(error=0.99, escapes=1) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"error": 1.2, "other": 1.2},
            "error at 20: the gradients' relative error is 1.2, over the limit of 1",
        ),
        (
            {"limit": 0.3, "error": 0.35},
            "error at 20: the relative error of 'a' is 0.35, over the limit of 0.3",
        ),
        ({"escapes": 60}, "escapes at 20: 5.86 % of the values lie outside"),
        ({"dropped_blocks": 2}, "dropped at 20: "),
        ({"nonfinite_blocks": 1}, "nonfinite at 20: 20 of 20 steps had gradients that are not finite"),
    ],
)
def test_each_kind_is_raised_once_with_its_numbers(options: dict[str, float], text: str) -> None:
    (found,) = alarms(**options, num_windows=3)  # type: ignore[arg-type]
    assert found.startswith(text)


def test_exact_codecs_cannot_err() -> None:
    assert alarms(exact=True, error=2.0, nonfinite_blocks=1) == []


def test_a_window_sees_only_its_own_steps() -> None:
    meter = Meter(["a", "b"])
    watch = Watch(meter, 0.5, times=False, exact=False)
    for number in range(3 * WINDOW_STEPS):
        step(
            meter,
            error=0.1 if number < 2 * WINDOW_STEPS else 0.6,
            other=0.6 if number >= 2 * WINDOW_STEPS else 0.1,
        )
        if watch.stepped():
            break
    assert meter.steps == 3 * WINDOW_STEPS
    assert summary(meter.state_dict())["relative_error"] < 0.5


def test_alarms_are_not_repeated_after_a_resume() -> None:
    meter = Meter(["a", "b"])
    watch = Watch(meter, 0.05, times=False, exact=False)
    for _ in range(WINDOW_STEPS):
        step(meter)
        watch.stepped()
    resumed = Watch(meter, 0.05, times=False, exact=False)
    resumed.load_state_dict(watch.state_dict())
    for _ in range(WINDOW_STEPS):
        step(meter)
        assert resumed.stepped() == []
    assert [alarm.kind for alarm in resumed.alarms] == ["error"]


def test_another_plan_is_watched_afresh_and_a_plan_that_comes_back_is_not() -> None:
    meter, rows, raised = Meter(["a", "b"]), [], []
    for plan in ("2.0", "3.0", "2.0"):
        watch = Watch(meter, 0.05, times=False, exact=False, plan=plan)
        watch.load_state_dict(rows)
        for _ in range(WINDOW_STEPS):
            step(meter)
            raised += [(alarm.plan, alarm.kind) for alarm in watch.stepped()]
        rows = watch.state_dict()
    assert raised == [("2.0", "error"), ("3.0", "error")]


@pytest.mark.parametrize(
    ("limit", "on_alarm"), [(0.0, "warn"), (-1.0, "warn"), (float("nan"), "warn"), (None, "stop")]
)
def test_impossible_options_are_refused(limit: float | None, on_alarm: str) -> None:
    with pytest.raises(ConfigError):
        check_options(limit, on_alarm)


def test_differences_of_a_meter_are_what_its_later_steps_added() -> None:
    meter = Meter(["a", "b"])
    step(meter)
    earlier = meter.state_dict()
    later = Meter(["a", "b"])
    for _ in range(2):
        step(meter, escapes=3)
        step(later, escapes=3)
    difference, alone = since(meter.state_dict(), earlier), later.state_dict()
    assert difference["steps"] == alone["steps"]
    assert difference["totals"] == pytest.approx(alone["totals"])
    assert difference["parameters"]["a"] == pytest.approx(alone["parameters"]["a"])
    assert since(meter.state_dict(), None) == meter.state_dict()


def test_calculated_bytes_are_told_apart_from_counted_ones() -> None:
    meter = Meter(["a", "b"])
    step(meter)
    meter.add(native_tally({"a": 512}, {"a": 8}, 2))
    found = summary(meter.state_dict())
    assert (found["native_bytes"], found["wire_bytes"], found["raw_bytes"]) == (4096, 4096 + 256, 4096 + 4096)


def test_ranks_follow_one_ranks_wish_together() -> None:
    def rank(transport: Transport) -> tuple[object, object]:
        switch = KillSwitch()
        if transport.rank == 1:
            switch.wish = "too slow"
        parameters = {"a": torch.ones(3)}
        notes = check_equal(parameters, transport, 7, [int(switch.wish is not None), transport.rank])
        assert [theirs[1] for theirs in notes] == [0, 1, 2]
        switch.agree([bool(theirs[0]) for theirs in notes], transport, step=7)
        return switch.off, switch.wish

    assert on_ranks(3, rank) == [({"step": 7, "reason": "rank 1: too slow"}, None)] * 3
