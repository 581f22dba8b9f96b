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


def test_equal_plans_have_equal_fingerprints() -> None:
    assert Plan.of("2").fingerprint() == Plan.of(2.0).fingerprint() == Plan.of("auto").fingerprint()
    assert Plan.of(2.0).fingerprint() != Plan.of(1.5).fingerprint()


@pytest.mark.parametrize("bits", ["losless", "delta", "", 99, -1, float("nan"), float("inf"), "nan"])
def test_an_impossible_wish_is_refused(bits: str | float) -> None:
    with pytest.raises(ConfigError):
        Plan.of(bits)
