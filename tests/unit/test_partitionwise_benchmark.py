"""How benchmarks.partitionwise composes times: steps to a common loss, and what the slowest rank gets done."""

from __future__ import annotations

import math

import pytest

from benchmarks.partitionwise_report import Curve, targets
from benchmarks.partitionwise_runs import CASES, SYSTEMS, _seconds_per_step


def test_steps_to_a_loss_lie_between_evaluations() -> None:
    curve = Curve((10, 20, 30), (3.0, 2.0, 1.5))
    assert curve.steps_to(2.5) == pytest.approx(15)
    assert curve.steps_to(4.0) == 10
    assert curve.steps_to(1.0) == math.inf


def test_a_rise_on_the_way_does_not_count() -> None:
    assert Curve((10, 20, 30), (2.0, 2.5, 1.0)).steps_to(1.75) == pytest.approx(25)


def test_one_lucky_evaluation_reaches_no_target() -> None:
    curve = Curve((10, 20, 30, 40, 50), (2.0, 1.0, 2.0, 2.0, 1.0))
    assert curve.steps_to(1.2) == pytest.approx(18)
    assert curve.smoothed(3).losses == pytest.approx((2.0, 1.5, 5 / 3, 5 / 3, 5 / 3))
    assert curve.smoothed(3).steps_to(1.2) == math.inf


def test_targets_are_native_s_last_loss_and_a_little_above() -> None:
    assert targets(Curve((1, 2), (2.0, 1.0))) == {1.0: 1.0, 1.02: 1.02, 1.05: 1.05}


def test_a_step_takes_as_long_as_on_the_last_rank() -> None:
    # The first rank ends early what the second one gets done at 2 s a step.
    assert _seconds_per_step([[0.0, 1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]], warm_up=1) == 2.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_systems_of_a_case_take_the_same_samples(ranks: int) -> None:
    for case in CASES.values():
        ours = {tuple(case.overrides(system, ranks, 0, 10)[len(case.settings) :]) for system in SYSTEMS}
        assert len(ours) == len(SYSTEMS)
        assert f"data.batch_size={case.batch // ranks}" in next(iter(ours)) and case.batch % ranks == 0
