"""Rates and delays as text, and what this machine lacks, without touching the network."""

from __future__ import annotations

import pytest

from cluster import namespaces
from cluster.emulate import main
from cluster.errors import EmulationError
from cluster.shaping import parse_delay, parse_rate, qdisc_arguments


@pytest.mark.parametrize(
    ("text", "bits"),
    [("100mbit", 10**8), ("1gbit", 10**9), ("2.5gbit", 25 * 10**8), ("64kbit", 64000), ("1GBIT", 10**9)],
)
def test_rates_are_read_in_powers_of_ten(text: str, bits: int) -> None:
    assert parse_rate(text) == bits


def test_no_rate_means_no_shaper() -> None:
    assert parse_rate("none") is None
    assert qdisc_arguments(None) == []


@pytest.mark.parametrize("text", ["", "fast", "1gb", "0mbit", "-1gbit", "1gbit/s"])
def test_a_wrong_rate_is_named_in_the_error(text: str) -> None:
    with pytest.raises(EmulationError, match="write it like 100mbit"):
        parse_rate(text)


def test_delays_are_read_in_seconds() -> None:
    assert parse_delay("200us") == pytest.approx(2e-4)
    assert parse_delay("5ms") == pytest.approx(5e-3)
    with pytest.raises(EmulationError, match="write it like 200us"):
        parse_delay("5")


def test_the_shaper_hangs_below_the_delay() -> None:
    netem, tbf = qdisc_arguments(10**9, 0.005)
    assert netem[:5] == ["root", "handle", "1:", "netem", "delay"]
    assert netem[5] == "5000us"
    assert tbf[:3] == ["parent", "1:1", "handle"]


def test_missing_iproute2_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    missing = namespaces.missing_requirements()
    assert any("program ip:" in piece and "apt-get install iproute2" in piece for piece in missing)
    assert any("program tc:" in piece for piece in missing)


def test_check_lists_what_is_missing_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["--check"]) == 1
    assert "missing: the program ip" in capsys.readouterr().out


def test_emulating_without_iproute2_fails_with_the_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["--", "true"]) == 125
    assert "it lacks\n  - the program ip" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no command"),
        (["--hosts", "0", "--", "true"], "no number of hosts"),
        (["--rate", "fast", "--", "true"], "no rate"),
        (["--workers-per-host", "0", "--", "true"], "no number of workers"),
        (["--json", "/nowhere/counts.json", "--", "true"], "no folder /nowhere"),
    ],
)
def test_wrong_arguments_end_without_a_traceback(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 125
    assert complaint in capsys.readouterr().err
