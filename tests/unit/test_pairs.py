"""Paired statistics: joined by seed, checked against numbers worked out by hand, and never without a failed run."""

from __future__ import annotations

import math

import pytest

from benchmarks.pairs import paired_difference


def test_the_interval_is_students() -> None:
    # Differences of 0, 1 and 2 %: standard deviation 1 %, t(0.975, 2) = 4.302653, over sqrt(3).
    found = paired_difference({0: 1.0, 1: 2.02, 2: 4.08}, {0: 1.0, 1: 2.0, 2: 4.0})
    assert found.mean == pytest.approx(0.01)
    assert found.half_width == pytest.approx(0.01 * 4.302653 / math.sqrt(3))
    assert found.upper95 == pytest.approx(found.mean + found.half_width)


def test_a_diverged_run_is_not_averaged_away() -> None:
    found = paired_difference({0: 1.0, 1: math.nan}, {0: 1.0, 1: 1.0})
    assert found.failed == (1,) and math.isinf(found.mean)


def test_unequal_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference({0: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0})


def test_one_pair_has_no_interval() -> None:
    found = paired_difference({3: 1.1}, {3: 1.0})
    assert found.mean == pytest.approx(0.1) and math.isnan(found.half_width)
