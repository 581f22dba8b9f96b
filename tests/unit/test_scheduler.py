"""The scheduler puts partitions where they train fastest, within memory, and says why."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_dl.coordinator import (
    Assignment,
    Decision,
    PartitionCosts,
    PartitionState,
    PlateauRule,
    RankFacts,
    ScheduleOptions,
    schedule,
    smoothed,
)
from efficient_dl.coordinator.grouping import best_groups
from efficient_dl.coordinator.memory import held_bytes
from efficient_dl.coordinator.pipelining import step_seconds
from efficient_dl.errors import ConfigError

FLAT = (1.0, 1.0, 1.0, 1.0)
FALLING = (1.0, 0.9, 0.8, 0.7)


def costs(*seconds: float, **fields: Any) -> list[PartitionCosts]:
    """One partition for each number of seconds of a micro-batch: a third forward, two thirds backward."""
    return [PartitionCosts(f"blocks.{k}", s / 3, s * 2 / 3, **fields) for k, s in enumerate(seconds)]


def options(kind: Any = "pipelined", **fields: Any) -> ScheduleOptions:
    return ScheduleOptions(kind, **{"micro_batches": 4, "stage_steps": 10, "total_steps": 100, **fields})


def fresh(number: int) -> list[PartitionState]:
    return [PartitionState()] * number


def where(decision: Decision) -> tuple[tuple[int, ...], ...]:
    return decision.assignment.ranks


# ---------------------------------------------------------------- properties of pipelined schedules
@st.composite
def cases(draw: st.DrawFn, most: int = 4) -> tuple[Any, ...]:
    seconds = st.integers(1, 9).map(float)
    parts = [
        PartitionCosts(
            f"p{k}",
            draw(seconds),
            draw(seconds),
            parameter_bytes=draw(st.integers(1, 20)),
            activation_bytes=draw(st.integers(0, 20)),
            output_bytes=draw(st.integers(0, 5)),
            head_seconds=draw(st.sampled_from([0.0, 1.0])),
            head_parameter_bytes=draw(st.integers(0, 3)),
        )
        for k in range(draw(st.integers(1, most)))
    ]
    memory = st.sampled_from([None, 60, 120, 400])
    kinds = draw(
        st.lists(
            st.builds(
                RankFacts, memory, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([None, 0.5, 2.0, 20.0])
            ),
            min_size=1,
            max_size=2,
        )
    )
    ranks = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most))
    states = [PartitionState(1, (), draw(st.booleans())) for _ in parts]
    chosen = options(
        micro_batches=draw(st.sampled_from([1, 2, 3, 4, 6])),
        optimizer_bytes_per_parameter_byte=draw(st.sampled_from([0.0, 2.0])),
        activation_share=draw(st.sampled_from([1.0, 0.25])),
        gradient_share=draw(st.sampled_from([1.0, 1 / 16])),
        release_frozen=draw(st.booleans()),
        plateau=None,
    )
    return parts, ranks, states, chosen


def held_and_training(
    states: Sequence[PartitionState], chosen: ScheduleOptions
) -> tuple[range, tuple[bool, ...]]:
    training = tuple(not state.frozen for state in states)
    trained = [k for k, trains in enumerate(training) if trains]
    return range(trained[0] if chosen.release_frozen else 0, trained[-1] + 1), training


def every_assignment(
    parts: Sequence[Any], ranks: Sequence[Any], chosen: ScheduleOptions, held: range
) -> Iterator[Assignment]:
    """By brute force: all maps from partitions to sets of ranks, sieved."""
    sets = [s for n in range(1, len(ranks) + 1) for s in itertools.combinations(range(len(ranks)), n)]
    sets = [s for s in sets if chosen.micro_batches % len(s) == 0]
    for picked in itertools.product(sets, repeat=len(held)):
        runs = [ranks_of for ranks_of, _ in itertools.groupby(picked)]
        shared = any(len(one) > 1 and one == other for one, other in itertools.pairwise(picked))
        if not shared and sum(map(len, runs)) == len(set().union(*runs)):
            by_index = dict(zip(held, picked, strict=True))
            yield Assignment(tuple(by_index.get(k, ()) for k in range(len(parts))))


def fits(assignment: Assignment, parts: Any, ranks: Any, training: Any, chosen: ScheduleOptions) -> bool:
    return all(
        facts.memory_bytes is None
        or held_bytes(parts, training, assignment.of_rank(rank), chosen) <= facts.memory_bytes
        for rank, facts in enumerate(ranks)
    )


@settings(max_examples=80, deadline=None)
@given(cases())
def test_no_other_assignment_is_faster(case: tuple[Any, ...]) -> None:
    parts, ranks, states, chosen = case
    if all(state.frozen for state in states):
        return
    held, training = held_and_training(states, chosen)
    seconds = [
        step_seconds(one, parts, ranks, training, chosen)
        for one in every_assignment(parts, ranks, chosen, held)
        if fits(one, parts, ranks, training, chosen)
    ]
    if not seconds:
        with pytest.raises(ConfigError, match="memory"):
            schedule(parts, ranks, states, chosen, 0)
        return
    decision = schedule(parts, ranks, states, chosen, 0)
    assert decision.training == training
    found = step_seconds(decision.assignment, parts, ranks, training, chosen)
    assert found == pytest.approx(min(seconds), rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(cases(most=7))
def test_an_assignment_keeps_all_rules(case: tuple[Any, ...]) -> None:
    parts, ranks, states, chosen = case
    try:
        decision = schedule(parts, ranks, states, chosen, 0)
    except ConfigError:
        return
    assert decision == schedule(list(parts), tuple(ranks), list(states), dataclasses.replace(chosen), 0)
    assert decision.reason and decision.reason.endswith(".")
    if not any(decision.training):
        assert decision.until_step == 0 and not any(where(decision))
        return
    held, training = held_and_training(states, chosen)
    assert fits(decision.assignment, parts, ranks, training, chosen)
    for k, group in enumerate(where(decision)):
        assert bool(group) == (k in held)
        assert not group or chosen.micro_batches % len(group) == 0
        assert group == tuple(sorted(set(group)))
    for rank in range(len(ranks)):
        holds = decision.assignment.of_rank(rank)
        assert list(holds) == list(range(holds[0], holds[-1] + 1)) if holds else True
        assert len(holds) < 2 or all(where(decision)[k] == (rank,) for k in holds)
    idle = [rank for rank in range(len(ranks)) if not decision.assignment.of_rank(rank)]
    assert bool(idle) == ("idle: " in decision.reason)


@settings(max_examples=40, deadline=None)
@given(cases(most=5))
def test_what_an_error_says_would_fit_does_fit(case: tuple[Any, ...]) -> None:
    parts, ranks, states, chosen = case
    small = [dataclasses.replace(facts, memory_bytes=20) for facts in ranks]
    if all(state.frozen for state in states):
        return
    try:
        schedule(parts, small, states, chosen, 0)
    except ConfigError as error:
        enough = int(re.findall(r"\((\d+) bytes\)", error.details["expected"])[0])
        enlarged = [dataclasses.replace(facts, memory_bytes=enough) for facts in ranks]
        assert schedule(parts, enlarged, states, chosen, 0).assignment.ranks
        short = [dataclasses.replace(facts, memory_bytes=enough - 1) for facts in ranks]
        with pytest.raises(ConfigError):
            schedule(parts, short, states, chosen, 0)


def test_many_unlike_ranks_are_laid_out_and_the_reason_says_what_counted_as_equal() -> None:
    ranks = [RankFacts(None, 1.0 + rank / 100) for rank in range(24)]
    decision = schedule(costs(*[1.0] * 6), ranks, fresh(6), options(micro_batches=24), 0)
    assert len(set().union(*map(set, where(decision)))) == 24
    assert "count as equally fast" in decision.reason


def test_no_search_finds_nothing_where_nothing_fits() -> None:
    assert best_groups(2, (3,), [1, 2], lambda group: math.inf) is None


# ---------------------------------------------------------------- pipelined, by example
def test_more_ranks_go_to_the_slower_partition() -> None:
    assert where(schedule(costs(1, 2, 1), [RankFacts()] * 4, fresh(3), options(), 0)) == ((0,), (1, 2), (3,))


def test_partitions_share_ranks_where_these_are_fewer() -> None:
    decision = schedule(costs(1, 1, 2, 1), [RankFacts()] * 2, fresh(4), options(), 0)
    assert where(decision) == ((0,), (0,), (1,), (1,))
    assert "A step takes 12 s" in decision.reason
    assert "partitions 0–1 on rank 0 (8 s), partitions 2–3 on rank 1 (12 s)" in decision.reason


def test_the_faster_rank_gets_the_slower_partition() -> None:
    ranks = [RankFacts(None, 1.0), RankFacts(None, 2.0)]
    assert where(schedule(costs(2, 1), ranks, fresh(2), options(), 0)) == ((1,), (0,))


def test_a_rank_that_cannot_help_is_said_to_be_idle() -> None:
    decision = schedule(costs(1), [RankFacts()] * 3, fresh(1), options(), 0)
    assert where(decision) == ((0, 1),)
    assert "Rank 2 is idle" in decision.reason and "4 micro-batches" in decision.reason


def test_a_group_does_not_grow_where_its_link_would_take_longer_than_it_saves() -> None:
    parts = costs(4.0, 8.0, parameter_bytes=1_000_000)
    fast, slow = [RankFacts(bytes_per_second=1e7)] * 3, [RankFacts(bytes_per_second=2e4)] * 3
    assert where(schedule(parts, fast, fresh(2), options(), 0)) == ((0,), (1, 2))
    found = schedule(parts, slow, fresh(2), options(), 0)  # 1 MB takes 50 s; alone it computes 32
    assert [len(group) for group in where(found)] == [1, 1]
    assert "Rank 2 is idle" in found.reason and "links" in found.reason
    assert where(schedule(parts, slow, fresh(2), options(gradient_share=1 / 16), 0)) == ((0,), (1, 2))


def test_neighbours_share_a_rank_where_streaming_between_two_is_slower_and_the_reason_names_the_link() -> (
    None
):
    parts = costs(1.0, 1.0, output_bytes=1_000_000)
    ranks = [RankFacts(bytes_per_second=4e5)] * 2  # 4 MB a step take 10 s; computing all takes 8
    assert where(schedule(parts, ranks, fresh(2), options(), 0)) == ((0,), (0,))
    apart = schedule(parts, ranks, fresh(2), options(activation_share=0.5), 0)
    assert where(apart) == ((0,), (1,))
    assert "partition 0 on rank 0 (5 s for its link)" in apart.reason.replace("5.00 s", "5 s")


def test_a_slow_rank_that_would_hold_up_a_group_is_left_out() -> None:
    ranks = [RankFacts(None, 0.5), RankFacts(None, 2.0)]
    assert where(schedule(costs(1), ranks, fresh(1), options(micro_batches=2), 0)) == ((1,),)


def test_memory_counts_state_queues_and_the_largest_activations() -> None:
    parts = costs(
        1, 1, 1, 1, parameter_bytes=100, activation_bytes=30, output_bytes=7, head_parameter_bytes=10
    )
    chosen = options(queue_micro_batches=2, reserved_bytes=1000)
    frozen_first = (False, True, True, False)
    # Partition 3 is nowhere: a queue of inputs, none of outputs.
    assert held_bytes(parts, frozen_first, [1, 2], chosen) == 1000 + 2 * 110 * 4 + 2 * 7 + (30 + 7)
    assert held_bytes(parts, frozen_first, [0], chosen) == 1000 + 100 + 2 * 7 + 7
    assert held_bytes(parts, frozen_first, [1], chosen) == 1000 + 110 * 4 + 2 * 7 + 2 * 7 + (30 + 7)
    assert held_bytes(parts, frozen_first, [], chosen) == 0
    two = options(queue_micro_batches=2, reserved_bytes=1000, window=2)
    heavy = [dataclasses.replace(one, head_activation_bytes=500) for one in parts]
    kept = 1000 + 2 * 110 * 4 + 2 * 7
    # One body waits with its output and that one's gradient, while the next one is there with its head.
    waiting = 30 + 2 * 7
    assert held_bytes(heavy, frozen_first, [1, 2], two) == kept + waiting + (30 + 500 + 7)
    both = dataclasses.replace(two, heads_wait=True)
    assert held_bytes(heavy, frozen_first, [1, 2], both) == kept + 2 * (30 + 500 + 7)
    # A layer that runs again does so when the head is done.
    for again, most in ((200, 500), (700, 700)):
        thrifty = [dataclasses.replace(one, again_bytes=again) for one in heavy]
        assert held_bytes(thrifty, frozen_first, [1, 2], chosen) == kept + (30 + most + 7)
        assert held_bytes(thrifty, frozen_first, [1, 2], two) == kept + waiting + (30 + most + 7)


def test_memory_moves_a_partition_to_a_rank_where_it_fits() -> None:
    parts = costs(1, 1, 1, 3, parameter_bytes=10)
    roomy = schedule(parts, [RankFacts(400)] * 2, fresh(4), options(), 0)
    assert where(roomy) == ((0,), (0,), (0,), (1,))
    assert where(schedule(parts, [RankFacts(80)] * 2, fresh(4), options(), 0)) == ((0,), (0,), (1,), (1,))


def test_a_frozen_partition_frees_its_ranks_for_the_others() -> None:
    parts, ranks = costs(2, 2), [RankFacts()] * 3
    before = schedule(parts, [RankFacts()] * 2, fresh(2), options(micro_batches=2), 0)
    assert where(before) == ((0,), (1,))
    converged = [PartitionState(40, FLAT), PartitionState(40, FALLING)]
    after = schedule(parts, ranks, converged, options(micro_batches=2), 40)
    assert after.training == (False, True)
    assert where(after) == ((0,), (1, 2))
    assert "Partition 0 (blocks.0) is frozen: its loss 1 changed by 0.00% a stage over" in after.reason
    assert "Only forward passes: partition 0 (blocks.0)." in after.reason
    released = schedule(parts, ranks, converged, options(micro_batches=3, release_frozen=True), 40)
    assert where(released) == ((), (0, 1, 2))


def test_nothing_is_held_behind_the_last_partition_that_trains() -> None:
    states = [PartitionState(9, FALLING), PartitionState(9, (), True)]
    decision = schedule(costs(1, 1), [RankFacts()] * 2, states, options(), 9)
    assert where(decision) == ((0, 1), ())
    assert "On no rank, because no partition in training needs it: partition 1 (blocks.1)." in decision.reason


def test_partitions_stay_where_they_are_unless_moving_gains_enough() -> None:
    ranks = [RankFacts()] * 2
    states = [PartitionState(10, (), False, place) for place in ((0,), (0,), (1,))]
    stays = schedule(costs(1, 1.02, 1), ranks, states, options(), 10)
    assert where(stays) == ((0,), (0,), (1,))
    split = [PartitionState(10, (), False, place) for place in ((0,), (1,), (1,))]
    nearly = schedule(costs(1, 1, 1.03), ranks, split, options(), 10)
    assert where(nearly) == ((0,), (1,), (1,)) and "less than 5% faster" in nearly.reason
    assert where(schedule(costs(1, 2, 0.5), ranks, states, options(), 10)) == ((0,), (1,), (1,))
    assert where(schedule(costs(1, 1.02, 1), ranks[:1], states, options(), 10)) == ((0,), (0,), (0,))


def test_unmeasured_times_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"nothing measured for blocks\.1"):
        schedule(costs(1, 0), [RankFacts()], fresh(2), options(), 0)


def test_a_partition_too_large_for_every_rank_is_named() -> None:
    parts = [*costs(1, parameter_bytes=10), PartitionCosts("big", 1, 1, 10_000_000)]
    with pytest.raises(ConfigError) as caught:
        schedule(parts, [RankFacts(1_000_000)] * 2, fresh(2), options(), 0)
    assert "the largest partition, 1 (big), needs 40 MB alone" in str(caught.value)
    assert "40 MB (40000000 bytes) each would do" in str(caught.value)
    assert "more partitions" in caught.value.details["fix"]


# ---------------------------------------------------------------- sequential and simultaneous
def run(kind: str, **fields: Any) -> list[Decision]:
    """All decisions of a run whose losses fall all the time."""
    chosen = options(kind, **fields)
    states, step, decisions = fresh(3), 0, list[Decision]()
    while not decisions or not decisions[-1].ended:
        decision = schedule(costs(1, 1, 1), [RankFacts()] * 2, states, chosen, step)
        assert not any(decision.training) or decision.until_step > step
        states = [
            PartitionState(state.steps + (decision.until_step - step) * trained)
            for state, trained in zip(states, decision.training, strict=True)
        ]
        step = decision.until_step
        decisions.append(decision)
    return decisions


def test_sequential_trains_one_after_the_other_and_then_ends() -> None:
    decisions = run("sequential", stage_steps=20)
    assert [decision.until_step for decision in decisions] == [20, 33, 53, 66, 86, 100, 100]
    assert [decision.training.index(True) for decision in decisions[:-1]] == [0, 0, 1, 1, 2, 2]
    assert where(decisions[2]) == ((0, 1), (0, 1), ())
    assert "Training ends at step 100: all partitions are trained." in decisions[-1].reason


def test_sequential_needs_no_rank_for_cached_features() -> None:
    assert where(run("sequential", release_frozen=True)[4]) == ((), (0, 1), ())


def test_simultaneous_trains_all_on_all_to_the_end() -> None:
    decisions = run("simultaneous", stage_steps=60)
    assert [decision.until_step for decision in decisions] == [60, 100, 100]
    assert where(decisions[0]) == ((0, 1),) * 3 and all(decisions[0].training)


def test_a_budget_below_the_runs_length_ends_it_early() -> None:
    assert [decision.until_step for decision in run("pipelined", partition_steps=25)] == [10, 20, 25, 25]


@pytest.mark.parametrize("kind", ["sequential", "simultaneous"])
def test_micro_batches_that_ranks_cannot_share_are_an_error(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule(costs(1), [RankFacts()] * 4, fresh(1), options(kind, micro_batches=6), 0)
    assert caught.value.details["fix"] == "micro_batches = 8, or 3 ranks"


def test_too_little_memory_names_the_rank_and_the_need() -> None:
    parts = costs(1, 1, parameter_bytes=100, activation_bytes=50)
    ranks = [RankFacts(1000), RankFacts(849)]
    with pytest.raises(ConfigError) as caught:
        schedule(parts, ranks, fresh(2), options("simultaneous", micro_batches=2), 0)
    assert "rank 1" in str(caught.value) and "(850 bytes)" in str(caught.value)
    assert where(schedule(parts, ranks, fresh(2), options("sequential", micro_batches=2), 0)) == ((0, 1), ())


def test_a_run_that_is_too_short_says_what_was_not_trained_to_its_end() -> None:
    states = [PartitionState(60, (), True), PartitionState(40)]
    decision = schedule(costs(1, 1), [RankFacts()], states, options("sequential", partition_steps=60), 100)
    assert not any(decision.training)
    assert (
        "steps are done, before these reached theirs: partition 1 (blocks.1) after 40 steps"
        in decision.reason
    )


# ---------------------------------------------------------------- convergence
@pytest.mark.parametrize(
    ("losses", "converged"),
    [
        (FLAT, True),
        ((2.0, 1.5, 1.3, *FLAT), True),
        (FALLING, False),
        (FLAT[:3], False),  # too few stages
        ((1.0, 1.002, 0.999, 1.001), True),
        ((1.0, 1.0, 1.3, 1.0, 1.0), True),  # one spike
        ((1.0, 0.99, 0.98, 1.2), False),  # falling, but for a spike
        ((1.0, 1.1, 1.2, 1.3), False),  # rising is not standing still
        ((1.0, 1.0, math.nan, 1.0), False),
        ((0.0, 0.0, 0.0, 0.0), True),
        ((-1.0, -1.1, -1.2, -1.3), False),
    ],
)
def test_a_loss_that_stands_still_has_converged(losses: tuple[float, ...], converged: bool) -> None:
    assert PlateauRule(0.005, 3).converged(losses) == converged


def test_one_spike_does_not_move_a_stages_loss() -> None:
    assert smoothed([1.0] * 19 + [50.0]) == 1.0
    assert math.isnan(smoothed([])) and math.isnan(smoothed([1.0, math.inf]))


def test_partitions_freeze_in_order_unless_told_otherwise() -> None:
    states = [PartitionState(40, FALLING), PartitionState(40, FLAT)]
    waits = schedule(costs(1, 1), [RankFacts()], states, options(), 40)
    assert waits.training == (True, True)
    assert "stands still too, but partition 0 (blocks.0) still changes what it gets" in waits.reason
    anyway = options(plateau=PlateauRule(in_order=False))
    assert schedule(costs(1, 1), [RankFacts()], states, anyway, 40).training == (True, False)


def test_a_loss_that_is_not_finite_is_reported_and_never_freezes() -> None:
    decision = schedule(costs(1), [RankFacts()], [PartitionState(40, (*FLAT, math.nan))], options(), 40)
    assert decision.training == (True,) and "is not finite" in decision.reason


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: options("zigzag"),
        lambda: options(micro_batches=0),
        lambda: options(partition_steps=0),
        lambda: options(move_gain=-1),
        lambda: PlateauRule(threshold=0),
        lambda: PlateauRule(patience=0),
        lambda: RankFacts(speed=math.nan),
        lambda: RankFacts(memory_bytes=0),
        lambda: schedule(costs(1), [], fresh(1), options(), 0),
        lambda: schedule(costs(1), [RankFacts()], fresh(2), options(), 0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        wrong()
