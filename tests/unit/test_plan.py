"""A wish for bits becomes a plan."""

from __future__ import annotations

import pytest

from efficient_dl.comm import Plan
from efficient_dl.errors import ConfigError


@pytest.mark.parametrize(
    ("bits", "codec"),
    [
        ("none", "none"),
        ("identity", "identity"),
        ("lossless", "lossless"),
        (2, "bits:2.0"),
        (1.5, "bits:1.5"),
        ("2.0", "bits:2.0"),
    ],
)
def test_a_wish_names_its_codec(bits: str | float, codec: str) -> None:
    assert Plan.of(bits).codec == codec


def test_auto_says_what_it_means() -> None:
    plan = Plan.of("auto")
    assert plan.codec == "bits:2.0"
    assert "auto is 2.0 bits" in plan.reason


def test_plans_that_do_the_same_have_equal_facts() -> None:
    assert Plan.of("2").facts() == Plan.of(2.0).facts() == Plan.of("auto").facts()
    assert Plan.of(2.0).facts() != Plan.of(1.5).facts()


def test_the_order_of_overrides_is_a_fact_but_the_first_rate_of_a_budget_is_not() -> None:
    rules: dict[str, str | float] = {"*.bias": "none", "head.*": 4.0}
    reverse = dict(reversed(rules.items()))
    assert Plan.of(2.0, overrides=rules).facts() != Plan.of(2.0, overrides=reverse).facts()
    two, four = (Plan.of(bytes_per_step=10_000, values_per_step=values) for values in (40_000, 60_000))
    assert two.first_rate != four.first_rate and two.facts() == four.facts()


@pytest.mark.parametrize("bits", ["losless", "delta", "", 99, -1, float("nan"), float("inf"), "nan"])
def test_an_impossible_wish_is_refused(bits: str | float) -> None:
    with pytest.raises(ConfigError):
        Plan.of(bits)
