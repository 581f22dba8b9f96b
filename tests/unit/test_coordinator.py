"""The coordinator's rounds, reports and resumes, with ranks that are threads of this process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from efficient_dl.coordinator import (
    Coordinator,
    Decision,
    History,
    PartitionCosts,
    Report,
    ScheduleOptions,
)
from efficient_dl.coordinator.facts import RankFacts
from efficient_dl.coordinator.report import merged_costs, merged_ranks
from efficient_dl.errors import CheckpointError, ConfigError, EdlError, PlanMismatch, TransportError

NAMES = ("embedding", "blocks", "output")
OPTIONS = ScheduleOptions("pipelined", micro_batches=4, stage_steps=10, total_steps=100)


def measured(speed: float = 1.0) -> dict[int, PartitionCosts]:
    """What a rank of this speed measures."""
    return {
        index: PartitionCosts(name, seconds / speed, 2 * seconds / speed, 1000, 500, 100)
        for index, (name, seconds) in enumerate(zip(NAMES, (1.0, 2.0, 1.0), strict=True))
    }


def on_ranks(world_size: int, function: Callable[[int, dist.Store], Any]) -> list[Any]:
    """Calls function(rank, store) on every rank at once; the values by rank, errors among them."""
    store = dist.HashStore()

    def rank(number: int) -> Any:
        try:
            return function(number, store)
        except EdlError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank, range(world_size)))


def losses(one: Coordinator, rank: int, value: float) -> dict[int, float]:
    """Of the partitions that this rank trained."""
    decision = one.history[-1].decision
    return {index: value for index in decision.assignment.of_rank(rank) if decision.training[index]}


def decided(
    world_size: int, steps: list[int], state: dict[str, Any] | None = None, loss: float | None = None
) -> list[Any]:
    """The states of all ranks, or their errors, after decisions at these steps; losses fall unless one is given."""

    def rank(number: int, store: dist.Store) -> dict[str, Any]:
        one = Coordinator(number, world_size, OPTIONS, store=store, timeout=20.0)
        if state is not None:
            one.load_state_dict(state)
        for position, step in enumerate(steps):
            report = Report(NAMES, measured() if position == 0 else {})
            if len(one.history) and step >= one.history[-1].decision.until_step:
                value = 3.0 - step / 50 if loss is None else loss
                report = dataclasses.replace(report, losses=losses(one, number, value))
            one.decide(step, report)
        one.close()
        return json.loads(json.dumps(one.state_dict()))

    return on_ranks(world_size, rank)


def test_all_ranks_keep_the_same_history_and_state() -> None:
    states = decided(4, [0, 10, 20, 30, 40], loss=2.0)
    assert states == [states[0]] * 4
    rows = states[0]["history"]
    assert rows[0]["ranks"] == [[0], [1, 2], [3]] and rows[0]["until_step"] == 10
    # Four equal losses each: all have converged at once.
    assert rows[-1]["training"] == [False] * 3 and "Training ends at step 40" in rows[-1]["reason"]
    assert History.from_rows(rows).to_rows() == rows


def test_a_faster_rank_is_found_by_the_time_that_all_ranks_took_for_the_same() -> None:
    def rank(number: int, store: dist.Store) -> tuple[Decision, Decision, bool]:
        one = Coordinator(number, 2, OPTIONS, store=store)
        costs = measured() if number == 0 else {}
        known = one.knows_speeds
        first = one.decide(0, Report(NAMES, costs, work_seconds=3.0 - 2.0 * number))
        return first, one.decide(10, Report(NAMES)), one.knows_speeds and not known

    for first, second, learned in on_ranks(2, rank):
        assert first.assignment.ranks == ((0,), (1,), (1,))
        assert second.assignment == first.assignment  # speeds stay known
        assert learned


@pytest.mark.parametrize(
    ("works", "speeds"),
    [
        ((1.0, 1.2, 1.1, 1.0), (1.0, 1.0, 1.0, 1.0)),  # noise
        ((1.0, 2.0, 2.1, 1.9), (2.0, 1.0, 1.0, 1.0)),
        ((8.0, 1.0, 1.1, 4.0, 4.2), (0.51, 3.9, 3.9, 1.0, 1.0)),
        ((1.0, 1.24, 1.26, 1.3), (1.0, 1.0, 1.0, 1.0)),  # each near the next
        ((1.0, 1.2, 1.4, 1.6, 1.9), (1.0, 1.0, 1.0, 0.69, 0.69)),  # but not all of them to all
        ((3.0,), (1.0,)),
    ],
)
def test_ranks_that_are_about_as_fast_count_as_equal(
    works: tuple[float, ...], speeds: tuple[float, ...]
) -> None:
    facts = merged_ranks([Report((), work_seconds=work) for work in works], ())
    assert tuple(one.speed for one in facts) == speeds


def test_speeds_stay_as_they_were_where_not_all_ranks_have_worked() -> None:
    facts = merged_ranks([Report((), work_seconds=1.0), Report(())], (1.0, 2.0))
    assert [one.speed for one in facts] == [1.0, 2.0]


def test_costs_hold_for_a_rank_of_the_middle_speed() -> None:
    ranks = [RankFacts(speed=2.0), RankFacts(speed=1.0)]
    reports = [Report(NAMES, measured(speed=2.0)), Report(NAMES)]
    before = [PartitionCosts(name) for name in NAMES]
    assert merged_costs(reports, ranks, before) == list(measured().values())


def test_costs_that_one_rank_measured_hold_for_all_and_stay_known() -> None:
    def rank(number: int, store: dist.Store) -> tuple[PartitionCosts, ...]:
        one = Coordinator(number, 2, OPTIONS, store=store)
        one.decide(0, Report(NAMES, {k: cost for k, cost in measured().items() if k % 2 == number}))
        one.decide(10, Report(NAMES))
        return one.costs

    assert on_ranks(2, rank) == [tuple(measured().values())] * 2


def test_the_store_does_not_grow_with_the_number_of_decisions() -> None:
    store = dist.HashStore()
    one = Coordinator(0, 1, OPTIONS, store=store)
    one.decide(0, Report(NAMES, measured()))
    before = store.num_keys()
    for step in range(10, 60, 10):
        one.decide(step, Report(NAMES))
    assert store.num_keys() == before


# ---------------------------------------------------------------- resume
@pytest.mark.parametrize("resumed_at", [10, 15])  # just after the decision, and in the middle of the stage
def test_a_resumed_run_decides_as_one_that_was_never_interrupted(resumed_at: int) -> None:
    whole = decided(2, [0, 10, 20, 30])
    first = decided(2, [0, 10])[0]
    assert decided(2, [resumed_at, 20, 30], first) == whole


def test_another_number_of_ranks_is_planned_for_at_once() -> None:
    resumed = decided(4, [15, 25], decided(2, [0, 10])[0])[0]
    rows = resumed["history"]
    assert [(row["step"], row["world_size"]) for row in rows] == [(0, 2), (10, 2), (15, 4), (25, 4)]
    assert rows[2]["ranks"] == [[0], [1, 2], [3]]
    assert [one["steps"] for one in resumed["states"]] == [25] * 3


def test_a_finished_run_goes_on_with_more_steps() -> None:
    one = Coordinator(0, 1, dataclasses.replace(OPTIONS, total_steps=10), store=dist.HashStore())
    one.decide(0, Report(NAMES, measured()))
    assert not any(one.decide(10, Report(NAMES)).training)
    more = Coordinator(0, 1, OPTIONS, store=dist.HashStore())
    more.load_state_dict(one.state_dict())
    assert all(more.decide(10, Report(NAMES)).training)


def test_other_options_are_planned_for_at_once() -> None:
    state = decided(1, [0])[0]
    one = Coordinator(0, 1, dataclasses.replace(OPTIONS, stage_steps=7), store=dist.HashStore())
    one.load_state_dict(state)
    assert one.decide(5, Report(NAMES)).until_step == 12


def test_only_steps_in_which_a_partition_trained_are_counted() -> None:
    one = Coordinator(0, 1, dataclasses.replace(OPTIONS, kind="sequential"), store=dist.HashStore())
    for step in (0, 10, 20, 30, 33):  # an even share of 100 steps is 33
        one.decide(step, Report(NAMES))
    assert one.decide(43, Report(NAMES)).training == (False, True, False)
    assert [(state.steps, state.frozen) for state in one.states] == [(33, True), (10, False), (0, False)]


def test_a_decision_is_made_anew_on_request() -> None:
    one = Coordinator(0, 1, OPTIONS, store=dist.HashStore())
    first = one.decide(0, Report(NAMES, measured()))
    assert one.decide(5, Report(NAMES)) == first and len(one.history) == 1
    assert one.decide(5, Report(NAMES), replan=True).until_step == 15
    assert [state.steps for state in one.states] == [5] * 3


def test_a_state_of_another_cut_is_refused() -> None:
    state = decided(2, [0])[0]
    state["costs"][1]["name"] = "blocks.0"
    for error in decided(2, [10], state):
        assert isinstance(error, CheckpointError) and "blocks.0" in str(error)


def test_a_step_before_the_last_decision_is_refused() -> None:
    error = decided(1, [5], decided(1, [0, 10])[0])[0]
    assert isinstance(error, PlanMismatch) and "at least 10" in str(error)


def test_a_damaged_state_is_refused() -> None:
    one = Coordinator(0, 1, OPTIONS, store=dist.HashStore())
    state = decided(1, [0])[0]
    state["history"][0]["until_step"] = 11
    with pytest.raises(CheckpointError, match="changed after it was made"):
        one.load_state_dict(state)
    with pytest.raises(CheckpointError, match="not a coordinator's state"):
        one.load_state_dict({"history": []})


# ---------------------------------------------------------------- disagreement
@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("options", "options.micro_batches = 8 (rank 2), 4 (rank 0)"),
        ("names", "partitions.2 = head (rank 2), output (rank 0)"),
        ("step", "step = 3 (rank 2), 0 (rank 0)"),
        ("facts", "facts.data = b (rank 2), a (rank 0)"),
        ("losses", "found: from rank 2"),
    ],
)
def test_a_rank_that_differs_is_named_on_every_rank(what: str, difference: str) -> None:
    def rank(number: int, store: dist.Store) -> None:
        differs = what if number == 2 else ""
        options = dataclasses.replace(OPTIONS, micro_batches=8) if differs == "options" else OPTIONS
        names = (*NAMES[:2], "head") if differs == "names" else NAMES
        facts = {"data": "b" if differs == "facts" else "a"}
        one = Coordinator(number, 3, options, store=store, facts=facts, timeout=20.0)
        report = Report(names, losses={0: 1.0} if differs == "losses" else {})
        one.decide(3 if differs == "step" else 0, report)

    for error in on_ranks(3, rank):
        assert isinstance(error, PlanMismatch)
        assert difference in str(error)


def test_what_no_assignment_can_do_is_the_same_error_everywhere() -> None:
    def rank(number: int, store: dist.Store) -> None:
        one = Coordinator(number, 2, OPTIONS, store=store, timeout=20.0)
        one.decide(0, Report(NAMES, measured(), memory_bytes=100))

    errors = on_ranks(2, rank)
    assert str(errors[0]) == str(errors[1])
    assert isinstance(errors[1], ConfigError) and "would do" in str(errors[1])


def test_after_an_error_nothing_has_changed() -> None:
    one = Coordinator(0, 1, OPTIONS, store=dist.HashStore())
    one.decide(0, Report(NAMES, measured(), memory_bytes=10**6))
    before = one.state_dict()
    with pytest.raises(ConfigError, match="memory"):
        one.decide(10, Report(NAMES, losses=losses(one, 0, 1.0), memory_bytes=100))
    assert one.state_dict() == before


def test_a_bug_on_rank_0_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficient_dl.coordinator.coordinator.merged_ranks", lambda *_: 1 / 0)

    def rank(number: int, store: dist.Store) -> Any:
        try:
            Coordinator(number, 2, OPTIONS, store=store, timeout=20.0).decide(0, Report(NAMES, measured()))
        except ZeroDivisionError as error:
            return error

    first, second = on_ranks(2, rank)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, TransportError) and "rank 0 failed: ZeroDivisionError" in str(second)


def test_closing_does_not_wait_for_ranks_that_never_came() -> None:
    def rank(number: int, store: dist.Store) -> str | None:
        one = Coordinator(number, 2, OPTIONS, store=store, timeout=0.1 if number == 0 else 0.2)
        one.close()  # before any round
        if number == 1:
            return None
        with pytest.raises(TransportError) as caught:
            one.decide(0, Report(NAMES, measured()))
        one._rounds.timeout = 1000.0
        one.close()
        return str(caught.value)

    assert "rank 0 heard nothing from rank 1" in on_ranks(2, rank)[0]


def test_two_coordinators_of_one_name_are_refused() -> None:
    store = dist.HashStore()
    Coordinator(0, 1, OPTIONS, store=store)
    Coordinator(0, 1, OPTIONS, store=store, name="another")
    with pytest.raises(ConfigError, match="already runs"):
        Coordinator(0, 1, OPTIONS, store=store)
