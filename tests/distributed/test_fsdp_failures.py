"""What goes wrong with a sharded model stops every rank, soon, with an error that names it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.errors import (
    CheckpointError,
    ConfigError,
    EdlError,
    PlanMismatch,
    TransportError,
)
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.meeting import stay_until
from tests.distributed.sharded_model import sharded, step

SOON = 100.0  # seconds, on a machine that may be busy; the time-out LATE is longer than a test may take
LATE = 250.0


def leaving(rank: int, how: str, timeout: float, given_up: Path) -> tuple[str, float, list[str]]:
    """Rank 1 leaves in the fourth step; the others return their error, its time, and what still runs after close().

    A silent rank stays until rank 0 has made the file given_up.
    """
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0, timeout=timeout)
    started = time.monotonic()
    try:
        for number in range(6):
            if rank == 1 and number == 3:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                stay_until(given_up)
                return "", 0.0, []
            started = time.monotonic()
            step(rank, number, model, optimizer)
    except TransportError as error:
        seconds = time.monotonic() - started
        given_up.touch()
        compression.close(timeout=60.0)
        return str(error), seconds, [t.name for t in threading.enumerate() if t.name.startswith("edl-")]
    raise AssertionError("no TransportError")


def test_a_killed_rank_is_a_transport_error_that_names_it(tmp_path: Path) -> None:
    outcomes = run_failing_ranks(leaving, 3, "killed", LATE, tmp_path / "given up")
    for rank in (0, 2):
        message, seconds, threads = outcomes[rank].value
        assert f"rank {rank} lost rank" in message
        assert seconds < SOON
        assert threads == []
        assert outcomes[rank].exit_code == 0


@pytest.mark.slow
def test_a_silent_rank_is_named_after_the_time_out(tmp_path: Path) -> None:
    outcome, other = run_failing_ranks(leaving, 2, "silent", 5.0, tmp_path / "given up")
    assert other.error is None, other.trace
    message, seconds, threads = outcome.value
    assert "rank 0 lost rank 1" in message
    assert seconds > 2.0
    assert threads == []


def with_options(rank: int, options: list[dict[str, Any]]) -> None:
    model = sharded()
    edl.compress(model, torch.optim.SGD(model.parameters(), lr=0.1), **options[rank])


DIFFERENT: dict[str, list[dict[str, Any]]] = {
    "plan.bits = 1.5 (rank 1), 2.0 (rank 0)": [{"bits": 2.0}, {"bits": 1.5}],
    "weights.bits = identity (rank 1), lossless (rank 0)": [{}, {"weights": "identity"}],
    "rank 1 cannot start: ConfigError": [{}, {"bits": 99}],
}


def mismatches(rank: int) -> list[str]:
    texts = []
    for options in DIFFERENT.values():
        with pytest.raises(EdlError) as caught:
            with_options(rank, options)
        texts.append(f"{type(caught.value).__name__}: {caught.value}")
    torch.distributed.barrier()  # a rank that leaves early breaks the other's first connection to it
    return texts


def test_different_options_are_named() -> None:
    for difference, text in zip(DIFFERENT, run_ranks(mismatches, 2)[0], strict=True):
        assert text.startswith("PlanMismatch") and difference in text


def refusals(rank: int) -> list[str]:
    """The errors of calls that cannot work."""
    model = sharded()
    plain = nn.Linear(3, 3)
    calls: list[tuple[nn.Module, dict[str, Any]]] = [
        (plain, {}),
        (DistributedDataParallel(plain), {"weights": "lossless"}),
        (model, {"hierarchy": "auto"}),
        (model, {"bits": "lossless", "error_feedback": True}),
        (model, {"bits": 2.0, "error_feedback": "sometimes"}),
        (model, {"check_every": -1}),
        (fully_shard(nn.Linear(4, 4).double()), {}),
    ]
    errors: list[str] = []
    for module, options in calls:
        with pytest.raises(EdlError) as caught:
            edl.compress(module, **options)
        errors.append(f"{type(caught.value).__name__}: {caught.value}")
    compression = edl.compress(model, bits="lossless", error_feedback="auto")  # off, so nothing is refused
    assert compression.stats()["error_feedback"] is False
    with pytest.raises(ConfigError) as caught:
        edl.compress(model)
    return [*errors, str(caught.value)]


def test_what_cannot_work_is_refused() -> None:
    plain, weights, hierarchy, feedback, words, negative, double, twice = run_ranks(refusals, 2)[0]
    assert "Linear" in plain
    assert "DistributedDataParallel" in plain
    assert "fully_shard" in plain
    assert "weights is not supported for DistributedDataParallel" in weights
    assert "hierarchy is not supported for FSDP2" in hierarchy
    assert "error_feedback has nothing to feed back" in feedback
    assert "unknown error_feedback" in words
    assert "check_every is negative" in negative
    assert "UnsupportedTensor" in double
    assert "has a custom collective already" in twice


def states(rank: int) -> list[str]:
    """The errors of states that do not fit."""
    model = sharded()
    compression = edl.compress(model, bits=2.0)
    state = compression.state_dict()
    compression.close()
    other = edl.compress(model, bits=1.0)
    errors: list[str] = []
    for wrong, kind in (
        (state, PlanMismatch),
        ({**state, "rank": 7}, CheckpointError),
        ({"version": 2, "rank": rank}, CheckpointError),
    ):
        with pytest.raises(kind) as caught:
            other.load_state_dict(wrong)
        errors.append(str(caught.value))
    return errors


def test_a_state_of_another_plan_rank_or_kind_is_refused() -> None:
    plan, rank, kind = run_ranks(states, 2)[1]
    assert "codec = bits:2.0 (checkpoint), bits:1.0 (run)" in plan
    assert "rank 1 was given the compression state of rank 7" in rank
    assert "no compression state of a sharded model" in kind
