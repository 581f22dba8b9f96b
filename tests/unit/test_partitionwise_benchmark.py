"""How benchmarks.partitionwise composes times: steps to a common loss, and what the slowest rank gets done."""

from __future__ import annotations

import math

import pytest

from benchmarks.partitionwise_report import Curve, parted, seconds_to, target
from benchmarks.partitionwise_runs import CASES, LENGTH, NATIVE, SYSTEMS, _seconds_per_step, ranks_of


def test_the_target_is_the_loss_after_a_part_of_the_run() -> None:
    assert Curve((10, 20, 30, 60), (4.0, 3.0, 2.0, 1.0)).at_target() == 3.0


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


def test_systems_are_compared_at_the_best_size_of_their_steps() -> None:
    found = {
        ("128 a step", NATIVE): Curve((10, 20, 60), (2.0, 1.0, 0.5)),
        ("512 a step", NATIVE): Curve((5, 10, 30), (2.0, 0.9, 0.8)),
        ("128 a step", "mine"): Curve((10, 20), (2.0, 0.8)),
    }
    seconds = {key: 3.0 if key[0].startswith("512") else 2.0 for key in found}
    assert target(found, 1.02) == pytest.approx(0.918)
    assert seconds_to(1.0, found, seconds, [NATIVE]) == pytest.approx(3.0 * (5 + 5 * 1.0 / 1.1))
    assert seconds_to(0.9, found, seconds, ["mine"]) == pytest.approx(2.0 * (10 + 10 * 1.1 / 1.2))
    assert seconds_to(0.1, found, seconds, ["mine"]) == math.inf
    assert parted("m on d, 8 x 128 a step, 2 ranks") == ("m on d, 2 ranks", "8 x 128 a step")


def test_a_step_takes_as_long_as_on_the_last_rank() -> None:
    # The first rank ends early what the second one gets done at 2 s a step.
    assert _seconds_per_step([[0.0, 1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]], warm_up=1) == 2.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_sizes_of_a_case_take_the_same_samples(ranks: int) -> None:
    for case in (one for cases in CASES.values() for one in cases):
        ours = {system: case.overrides(system, ranks, 0, 10, 0.1) for system in SYSTEMS}
        assert len(set(map(tuple, ours.values()))) == len(SYSTEMS) and case.batch % ranks == 0
        for system, settings in ours.items():
            assert f"data.batch_size={case.batch // ranks_of(system, ranks)}" in settings
        assert case.steps * case.batch == LENGTH * case.samples and case.every % case.batch == 0
        assert (
            case.samples % case.every == 0
        )  # what sets the target, and the last step, are evaluated in turn
