"""Rank 0 decides over torch's store, every rank checks it, and whoever is missing or differs is named on all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from efficient_dl.coordinator import Coordinator, History, PartitionCosts, Report, ScheduleOptions
from efficient_dl.coordinator import coordinator as shell
from efficient_dl.errors import CheckpointError, ConfigError, PlanMismatch, TransportError
from tests.distributed.launch import run_failing_ranks, run_ranks

NAMES = ("embedding", "blocks", "output")
OPTIONS = ScheduleOptions("pipelined", micro_batches=4, stage_steps=10, total_steps=100)


def measured(speed: float = 1.0) -> dict[int, PartitionCosts]:
    """What a rank of this speed measures."""
    return {
        index: PartitionCosts(name, seconds / speed, 2 * seconds / speed, 1000, 500, 100)
        for index, (name, seconds) in enumerate(zip(NAMES, (1.0, 2.0, 1.0), strict=True))
    }


def coordinator(rank: int, options: ScheduleOptions = OPTIONS, **fields: Any) -> Coordinator:
    return Coordinator(rank, dist.get_world_size(), options, **{"timeout": 20.0, **fields})


def losses(one: Coordinator, rank: int, value: float) -> dict[int, float]:
    decision = one.history[-1].decision
    return {index: value for index in decision.assignment.of_rank(rank) if decision.training[index]}


def whole_run(
    rank: int, speeds: list[float], num_stages: int
) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    one = coordinator(rank)
    decision = one.decide(0, Report(NAMES, measured(speeds[rank]), memory_bytes=10**6))
    for stage in range(1, num_stages):
        if not any(decision.training):
            break
        report = Report(NAMES, losses=losses(one, rank, 2.0), memory_bytes=10**6)
        decision = one.decide(decision.until_step, report)
        assert stage < 4 or not decision.training[0]
    num_keys = dist.distributed_c10d._get_default_store().num_keys()
    one.close()
    return one.history.to_rows(), json.loads(json.dumps(one.state_dict())), num_keys


def test_ranks_decide_alike_until_all_partitions_have_converged() -> None:
    results = run_ranks(whole_run, 4, [1.0] * 4, 30)
    assert all(rows == results[0][0] and state == results[0][1] for rows, state, _ in results)
    rows = results[0][0]
    assert rows[0]["ranks"] == [[0], [1, 2], [3]] and rows[0]["until_step"] == 10
    assert [row["step"] for row in rows] == [
        0,
        10,
        20,
        30,
        40,
    ]  # four equal losses each: all converge at once
    assert rows[-1]["training"] == [False] * 3 and "Training ends at step 40" in rows[-1]["reason"]
    assert History.from_rows(rows).to_rows() == rows


def test_a_faster_rank_is_found_by_what_all_ranks_measured() -> None:
    (rows, state, _), _ = run_ranks(whole_run, 2, [1.0, 3.0], 1)
    assert state["speeds"] == pytest.approx([0.65, 2.0 / 1.0 * 0.0 + state["speeds"][1]])
    assert state["speeds"][1] / state["speeds"][0] == pytest.approx(3.0, rel=0.05)
    assert rows[0]["ranks"] == [[0], [1], [1]]


def stored_keys(rank: int, num_stages: int) -> int:
    return whole_run(rank, [1.0] * 2, num_stages)[2]


def test_the_store_does_not_grow_with_the_number_of_stages() -> None:
    short, long = run_ranks(stored_keys, 2, 2)[0], run_ranks(stored_keys, 2, 4)[0]
    assert abs(long - short) <= 4


# ---------------------------------------------------------------- resume
def interrupted(
    rank: int, state: dict[str, Any] | None, steps: list[int]
) -> tuple[Any, list[dict[str, Any]]]:
    """Decides at these steps; the losses are those of a run without a break."""
    one = coordinator(rank)
    if state is not None:
        one.load_state_dict(state)
    for number, step in enumerate(steps):
        report = Report(NAMES, measured() if number == 0 else {})
        if len(one.history) and step >= one.history[-1].decision.until_step:
            report = dataclasses.replace(report, losses=losses(one, rank, 3.0 - step / 50))
        one.decide(step, report)
    one.close()
    return one.state_dict(), one.history.to_rows()


def test_a_resumed_run_decides_as_one_that_was_never_interrupted() -> None:
    whole = run_ranks(interrupted, 2, None, [0, 10, 20, 30])[0]
    first = run_ranks(interrupted, 2, None, [0, 10])[0]
    for resumed_at in (10, 15):  # at the stage's begin, after the decision; and in its middle
        assert run_ranks(interrupted, 2, first[0], [resumed_at, 20, 30])[0] == whole


def test_another_number_of_ranks_is_planned_for_at_once() -> None:
    state = run_ranks(interrupted, 2, None, [0, 10])[0][0]
    resumed, rows = run_ranks(interrupted, 4, state, [15, 25])[0]
    assert [(row["step"], row["world_size"]) for row in rows] == [(0, 2), (10, 2), (15, 4), (25, 4)]
    assert rows[2]["ranks"] == [[0], [1, 2], [3]]
    assert [one["steps"] for one in resumed["states"]] == [25] * 3


def test_a_state_of_another_cut_is_refused() -> None:
    state = run_ranks(interrupted, 2, None, [0])[0][0]
    state["costs"][1]["name"] = "blocks.0"
    for outcome in run_failing_ranks(interrupted, 2, state, [10]):
        assert isinstance(outcome.error, CheckpointError) and "blocks.0" in str(outcome.error)


def test_a_damaged_state_is_refused() -> None:
    one = Coordinator(0, 1, OPTIONS, store=dist.HashStore())
    one.decide(0, Report(NAMES, measured()))
    state = one.state_dict()
    state["history"][0]["until_step"] = 11
    with pytest.raises(CheckpointError, match="changed after it was made"):
        one.load_state_dict(state)
    with pytest.raises(CheckpointError, match="not a coordinator's state"):
        one.load_state_dict({"history": []})


# ---------------------------------------------------------------- disagreement
def differing(rank: int, what: str) -> None:
    fields: dict[str, Any] = {"facts": {"data": "a"}}
    options, costs, names, step, given = OPTIONS, measured(), NAMES, 0, {}
    if rank == 2:
        if what == "costs":
            costs[1] = dataclasses.replace(costs[1], parameter_bytes=7)
        if what == "options":
            options = dataclasses.replace(OPTIONS, micro_batches=8)
        if what == "names":
            names = (*NAMES[:2], "head")
            costs.pop(2)
        if what == "step":
            step = 3
        if what == "facts":
            fields["facts"]["data"] = "b"
        if what == "losses":
            given = {0: 1.0}
        if what == "version":
            shell.SCHEDULER_VERSION = 0
        if what == "scheduler":  # another version of the code that says nothing of it
            true_schedule = shell.schedule
            shell.schedule = lambda *inputs: dataclasses.replace(true_schedule(*inputs), until_step=9)
    coordinator(rank, options, **fields).decide(step, Report(names, costs, given))


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("costs", "costs.1.parameter_bytes = 7 (rank 2), 1000 (rank 0)"),
        ("options", "options.micro_batches = 8 (rank 2), 4 (rank 0)"),
        ("names", "partitions.2 = head (rank 2), output (rank 0)"),
        ("step", "step = 3 (rank 2), 0 (rank 0)"),
        ("facts", "facts.data = b (rank 2), a (rank 0)"),
        ("losses", "from rank 2"),
        ("version", "scheduler version = 0 (rank 2), 1 (rank 0)"),
        ("scheduler", "rank 2 came to another decision than rank 0"),
    ],
)
def test_a_rank_that_differs_is_named_on_every_rank(what: str, difference: str) -> None:
    for outcome in run_failing_ranks(differing, 3, what):
        assert isinstance(outcome.error, PlanMismatch)
        assert difference in str(outcome.error)


def impossible(rank: int) -> None:
    coordinator(rank).decide(0, Report(NAMES, measured(), memory_bytes=100))


def test_what_no_assignment_can_do_is_the_same_error_everywhere() -> None:
    outcomes = run_failing_ranks(impossible, 2)
    assert len({str(outcome.error) for outcome in outcomes}) == 1
    assert isinstance(outcomes[1].error, ConfigError) and "would do" in str(outcomes[1].error)


# ---------------------------------------------------------------- ranks that are gone
def leaving(rank: int, gone: int) -> None:
    one = coordinator(rank, timeout=1.0)
    decision = one.decide(0, Report(NAMES, measured()))
    if rank == gone:
        os.kill(os.getpid(), signal.SIGKILL)
    one.decide(decision.until_step, Report(NAMES, losses=losses(one, rank, 1.0)))


def test_a_dead_rank_0_is_an_error_on_the_others() -> None:
    outcomes = run_failing_ranks(leaving, 3, 0)
    for outcome in outcomes[1:]:
        assert isinstance(outcome.error, TransportError)
        assert f"rank 0 did not answer rank {outcome.rank} within 2 s" in str(outcome.error)


def test_a_dead_rank_is_named_on_every_other() -> None:
    outcomes = run_failing_ranks(leaving, 3, 1)
    for rank in (0, 2):
        assert isinstance(outcomes[rank].error, TransportError)
        assert "rank 0 heard nothing from rank 1 within 1 s" in str(outcomes[rank].error)


def hosted_by_rank_0(rank: int, file: str) -> None:
    """The store is in rank 0, as under init_process_group without a launcher."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=20), wait_for_workers=False)
        Path(file + ".part").write_text(str(store.port))
        Path(file + ".part").rename(file)
    else:
        while not Path(file).exists():
            pass
        store = dist.TCPStore("127.0.0.1", int(Path(file).read_text()), 2, False, timedelta(seconds=20))
    one = coordinator(rank, store=store, timeout=60.0)
    one.decide(0, Report(NAMES, measured()))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    one.decide(10, Report(NAMES))


def test_a_store_that_dies_with_rank_0_is_an_error_at_once(tmp_path: Path) -> None:
    outcome = run_failing_ranks(hosted_by_rank_0, 2, str(tmp_path / "port"), timeout=50.0)[1]
    assert isinstance(outcome.error, TransportError) and "cannot reach torch's store" in str(outcome.error)


def test_two_coordinators_of_one_name_are_refused() -> None:
    store = dist.HashStore()
    Coordinator(0, 1, OPTIONS, store=store)
    Coordinator(0, 1, OPTIONS, store=store, name="another")
    with pytest.raises(ConfigError, match="already runs"):
        Coordinator(0, 1, OPTIONS, store=store)
