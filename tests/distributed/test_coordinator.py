"""The coordinator between processes: who differs, or is gone, is named on all that are left."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from efficient_dl.coordinator import Coordinator, PartitionCosts, Report, ScheduleOptions
from efficient_dl.coordinator import coordinator as shell
from efficient_dl.errors import PlanMismatch, TransportError
from tests.distributed.launch import run_failing_ranks, run_ranks

NAMES = ("embedding", "blocks", "output")
MEASURED = {
    index: PartitionCosts(name, seconds, 2 * seconds, 1000, 500, 100)
    for index, (name, seconds) in enumerate(zip(NAMES, (1.0, 2.0, 1.0), strict=True))
}


def coordinator(rank: int, **fields: Any) -> Coordinator:
    options = ScheduleOptions("pipelined", micro_batches=4, stage_steps=10, total_steps=40)
    return Coordinator(rank, dist.get_world_size(), options, **{"timeout": 20.0, **fields})


def differing(rank: int) -> list[str]:
    """The errors of a rank 1 with other costs, with another scheduler that says so, and with one that does not."""
    costs, true_schedule, true_version = dict(MEASURED), shell.schedule, shell.SCHEDULER_VERSION
    texts: list[str] = []
    for what in ("costs", "version", "scheduler"):
        if rank == 1:
            costs[1] = dataclasses.replace(MEASURED[1], parameter_bytes=7 if what == "costs" else 1000)
            shell.SCHEDULER_VERSION = 0 if what == "version" else true_version
            if what == "scheduler":
                shell.schedule = lambda *inputs: dataclasses.replace(true_schedule(*inputs), until_step=9)
        try:
            coordinator(rank, name=what).decide(0, Report(NAMES, costs))
        except PlanMismatch as error:
            texts.append(str(error))
    return texts


def test_a_rank_with_other_costs_or_another_scheduler_is_named_on_every_rank() -> None:
    for costs, version, scheduler in run_ranks(differing, 3):
        assert "costs.1.parameter_bytes = 7 (rank 1), 1000 (rank 0)" in costs
        assert f"scheduler version = 0 (rank 1), {shell.SCHEDULER_VERSION} (rank 0)" in version
        assert "rank 1 came to another decision than rank 0" in scheduler


def whole_run(rank: int) -> list[dict[str, Any]]:
    one = coordinator(rank)
    decision = one.decide(0, Report(NAMES, MEASURED))
    while any(decision.training):
        trained = [index for index in decision.assignment.of_rank(rank) if decision.training[index]]
        losses = dict.fromkeys(trained, 10.0 - decision.until_step / 10)
        decision = one.decide(decision.until_step, Report(NAMES, losses=losses))
    one.close()
    return one.history.to_rows()


def leaving(rank: int, gone: int) -> None:
    rows = whole_run(rank)
    one = coordinator(rank, timeout=4.0, name="second")
    if rank == gone:
        os.kill(os.getpid(), signal.SIGKILL)
    assert rows[-1]["step"] == 40
    one.decide(0, Report(NAMES, MEASURED))


@pytest.mark.parametrize(
    ("gone", "text"),
    [(0, "rank 0 did not answer rank {rank} within 8 s"), (1, "rank 0 heard nothing from rank 1 within 4 s")],
)
def test_after_a_whole_run_a_dead_rank_is_an_error_on_the_others(gone: int, text: str) -> None:
    for outcome in run_failing_ranks(leaving, 4, gone):
        if outcome.rank != gone:
            assert isinstance(outcome.error, TransportError)
            assert text.format(rank=outcome.rank) in str(outcome.error)


def hosted_by_rank_0(rank: int, port: Path) -> None:
    """The store is in rank 0, as under init_process_group without a launcher."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=100), wait_for_workers=False)
        port.with_suffix(".part").write_text(str(store.port))
        port.with_suffix(".part").rename(port)
    else:
        deadline = time.monotonic() + 60
        while not port.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), 2, False, timedelta(seconds=100))
    one = coordinator(rank, store=store, timeout=250.0)
    one.decide(0, Report(NAMES, MEASURED))
    if rank == 0:
        one.close()
        os.kill(os.getpid(), signal.SIGKILL)
    one.decide(10, Report(NAMES))


def test_a_store_that_ends_with_rank_0_is_an_error_before_the_time_out(tmp_path: Path) -> None:
    outcome = run_failing_ranks(hosted_by_rank_0, 2, tmp_path / "port")[1]
    assert isinstance(outcome.error, TransportError) and "cannot reach torch's store" in str(outcome.error)
