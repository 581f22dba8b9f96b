"""Ranks that are set up differently stop before the first collective, and say what differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from efficient_dl.comm import Transport, gather_json, handshake
from efficient_dl.errors import ConfigError, EdlError, PlanMismatch
from tests.unit.ranks import on_ranks


def errors(facts: Callable[[int], dict[str, Any]], failing: int | None = None) -> list[EdlError | None]:
    """What each of three ranks raises."""

    def rank(transport: Transport) -> EdlError | None:
        failure = ConfigError("bits out of range") if transport.rank == failing else None
        try:
            handshake(facts(transport.rank), transport, failure)
        except EdlError as error:
            return error
        return None

    return on_ranks(3, rank)


def test_equal_facts_pass() -> None:
    assert errors(lambda rank: {"plan": {"bits": "2.0"}, "parameters": {"a": "float32 [3]"}}) == [None] * 3


def test_every_rank_names_the_same_difference() -> None:
    raised = errors(lambda rank: {"plan": {"bits": "1.5" if rank == 2 else "2.0"}, "torch": "2.13"})
    assert all(isinstance(error, PlanMismatch) for error in raised)
    assert len({str(error) for error in raised}) == 1
    assert "plan.bits = 1.5 (rank 2), 2.0 (rank 0)" in str(raised[0])


def test_a_fact_that_one_rank_lacks_is_named() -> None:
    raised = errors(lambda rank: {"parameters": {"a": "float32 [3]"} if rank else {}})
    assert "parameters.a = float32 [3] (rank 1), absent (rank 0)" in str(raised[0])
    assert "ranks 1, 2" in str(raised[0])


def test_a_rank_that_cannot_start_tells_the_others() -> None:
    raised = errors(lambda rank: {"torch": "2.13"}, failing=1)
    assert isinstance(raised[1], ConfigError)
    for rank in (0, 2):
        assert isinstance(raised[rank], PlanMismatch)
        assert "rank 1 cannot start: ConfigError: bits out of range" in str(raised[rank])


def test_gathered_values_arrive_exactly() -> None:
    values = [{"float": 0.1 + rank, "text": "Ø", "list": [rank] * rank} for rank in range(3)]
    assert on_ranks(3, lambda transport: gather_json(values[transport.rank], transport)) == [values] * 3


@pytest.mark.parametrize("value", [None, [], 2**60])
def test_small_values_are_gathered(value: Any) -> None:
    assert on_ranks(2, lambda transport: gather_json(value, transport)) == [[value] * 2] * 2
