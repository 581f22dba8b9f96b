"""Whether a running training changes its plan: hysteresis, the allowance of looks, and what calls for one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_dl.comm.look import Allowance, Window
from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements, assumed_network
from efficient_dl.comm.planner import PlannerOptions, Shapes
from efficient_dl.comm.replanning import Hysteresis, PlanState, Verdict, reconsider

MEGABIT = 1e6 / 8
MODEL = Shapes((1_000_000,) * 10)
AT_ONCE = Hysteresis(distance_steps=0)


def network(megabits: float) -> Measurements:
    speed = megabits * MEGABIT
    codecs = (
        CodecSpeed("lossless", 2e-9, 1.5e-9, 3.39),
        CodecSpeed("bits:4.0", 2.5e-9, 1.6e-9, 0.501),
        CodecSpeed("bits:2.0", 3e-9, 1.7e-9, 0.2505),
    )
    line = Line(2e-4, speed)
    return Measurements((1, 1), line, line, None, None, (), codecs, 0.3, contended=True)


def judged(
    state: PlanState, now: Measurements, floor: float = 2.0, step: int = 0, **options: float
) -> Verdict:
    hysteresis = replace(AT_ONCE, **options)  # pyright: ignore[reportArgumentType]
    return reconsider(state, now, MODEL, floor, step, hysteresis=hysteresis)


def test_a_plan_changes_after_two_clear_wins_in_a_row_and_not_for_noise() -> None:
    state = PlanState("none", False)
    slow, fast = network(100), network(100_000)
    first = judged(state, slow)
    assert first.decision is None and first.state.wins == 1 and "1 of 2" in first.reason
    interrupted = judged(first.state, fast)
    assert interrupted.decision is None and interrupted.state == state
    again = judged(interrupted.state, slow)
    assert again.decision is None
    second = judged(again.state, slow, step=7)
    assert second.decision is not None and second.state == PlanState("2.0", False, since_step=7)
    assert PlanState.from_json(json.loads(json.dumps(first.state.to_json()))) == first.state
    back = judged(second.state, fast, step=7, patience=1)
    assert back.decision is not None and back.state.bits == "none"


def test_a_small_gain_switches_nothing() -> None:
    near = network(2.0)  # where 2 bits beat 4 bits by far
    assert judged(PlanState("4.0", False), near, patience=1).decision is not None
    keeps = judged(PlanState("4.0", False), near, patience=1, gain=0.9)
    assert keeps.decision is None and "too small" in keeps.reason


def test_a_plan_under_a_raised_floor_is_left_at_once() -> None:
    left = judged(PlanState("2.0", False), network(100), floor=4.0)
    assert left.decision is not None and left.state == PlanState("4.0", False)


def test_a_young_plan_stays_until_its_distance_is_reached() -> None:
    young = PlanState("none", False, since_step=100)
    for step in (110, 120, 199):
        kept = reconsider(young, network(100), MODEL, 2.0, step, hysteresis=Hysteresis(distance_steps=100))
        assert kept.decision is None
        young = kept.state
    assert reconsider(young, network(100), MODEL, 2.0, 200).decision is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(5, 1e5), min_size=1, max_size=25),
    st.sampled_from(["none", "lossless", "4.0", "2.0"]),
)
def test_however_a_link_behaves_switches_keep_their_distance_and_each_has_won_twice(
    megabits: list[float], bits: str
) -> None:
    state, switches = PlanState(bits, False), [0]
    hysteresis = Hysteresis(distance_steps=100)
    for look, speed in enumerate(megabits):
        step = 50 * (look + 1)
        before, verdict = state, reconsider(state, network(speed), MODEL, 2.0, step, hysteresis=hysteresis)
        assert verdict == reconsider(before, network(speed), MODEL, 2.0, step, hysteresis=hysteresis)
        state = verdict.state
        if verdict.decision is not None:
            assert before.rival == verdict.decision.plan
            assert step - switches[-1] >= 100
            switches.append(step)
        else:
            assert state.plan == before.plan


@settings(max_examples=40, deadline=None)
@given(st.floats(5, 1e5), st.lists(st.floats(0.97, 1.03), min_size=4, max_size=12))
def test_noise_of_three_percent_leads_to_one_switch_at_most(megabits: float, noise: list[float]) -> None:
    """Two plans that are equally good within the noise are not changed to and fro."""
    state, count = PlanState("none", False), 0
    for look, factor in enumerate(noise):
        verdict = judged(state, network(megabits * factor), step=50 * look)
        state = verdict.state
        count += verdict.decision is not None
    assert count <= 1


def test_a_hierarchy_that_loses_to_flat_by_little_is_kept() -> None:
    """Both reductions of one codec are compared, though predictions list only the faster one."""
    options = PlannerOptions(hierarchy=True, native=False)
    shared = assumed_network(network(100), 100 * MEGABIT, nodes=4, ranks_per_node=8, latency_seconds=1e-4)
    flat = reconsider(PlanState("2.0", False), shared, MODEL, 2.0, 0, options, AT_ONCE)
    assert flat.decision is None and flat.state.rival == ("2.0", True, 0)
    much = reconsider(PlanState("2.0", False), shared, MODEL, 2.0, 0, options, replace(AT_ONCE, gain=0.99))
    assert much.decision is None and much.state.rival is None and "too small" in much.reason


def test_a_hierarchy_that_cannot_be_had_any_more_is_left_at_once() -> None:
    left = judged(PlanState("2.0", True), network(100))
    assert left.decision is not None and not left.state.hierarchy


# -------------------------------------------------------------------- when to look
@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 5), st.lists(st.tuples(st.floats(0.01, 100), st.booleans()), min_size=1, max_size=60))
def test_looks_take_no_more_than_their_share_and_the_first_few(
    cost: float, windows: list[tuple[float, bool]]
) -> None:
    allowance = Allowance(cost=cost)
    elapsed = looked = 0.0
    for seconds, early in windows:
        elapsed += seconds
        allowance = allowance.earned(seconds)
        if allowance.allows(early):
            allowance = allowance.spent(cost)
            looked += cost
    assert looked <= allowance.share * elapsed + 3 * cost + 1e-9


def test_a_regular_look_waits_for_a_full_allowance_and_an_early_one_does_not() -> None:
    allowance = Allowance(looks=1.5, cost=1.0)
    assert allowance.allows(early=True) and not allowance.allows(early=False)
    assert allowance.earned(2.5 / allowance.share).allows(early=False)
    assert not allowance.spent(1.0).allows(early=True)


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (Window(1.1, 1e-8, 2.0), None),
        (Window(1.3, 1e-8, 2.0), "steps"),
        (Window(0.7, 1e-8, 2.0), "steps"),
        (Window(1.0, 2e-8, 2.0), "bytes"),
        (Window(1.0, 1e-8, 2.2), "values"),
        (Window(1.0, 0.0, 0.0), None),
    ],
)
def test_a_change_in_a_runs_own_counts_calls_for_a_look(now: Window, why: str | None) -> None:
    assert (now.differs(Window(1.0, 1e-8, 2.0)) or "").startswith(why or "")
    assert (now.differs(Window(1.0, 1e-8, 2.0)) is None) == (why is None)


def test_groups_are_gone_over_to_after_two_wins_and_kept_where_flat_gains_little() -> None:
    options = PlannerOptions(native=False, groups=True)

    def found(latency: float) -> Measurements:
        return assumed_network(network(1000), 1000 * MEGABIT, 16, 1, latency)

    first = reconsider(PlanState("2.0", False), found(0.05), MODEL, 2.0, 0, options, AT_ONCE)
    assert first.decision is None and first.state.rival == ("4.0", False, 4)
    assert PlanState.from_json(json.loads(json.dumps(first.state.to_json()))) == first.state
    second = reconsider(first.state, found(0.05), MODEL, 2.0, 7, options, AT_ONCE)
    assert second.state == PlanState("4.0", False, since_step=7, group_size=4)
    assert "in groups of 4" in second.reason
    kept = reconsider(second.state, found(1e-9), MODEL, 2.0, 9, options, replace(AT_ONCE, patience=1))
    assert kept.decision is None and "too small" in kept.reason
