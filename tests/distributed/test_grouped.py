"""Groups of ranks over gloo: training, resuming, planning by measurements, and a rank that dies."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

import efficient_dl as edl
from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements, assumed_network
from efficient_dl.errors import ConfigError, PlanMismatch, TransportError
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.test_hierarchy import SOON, ddp, same_bits, wishes

STEPS = 5


def network(latency: float) -> Measurements:
    """Four hosts with links of 100 Mbit/s, and messages that take so many seconds."""
    codecs = (CodecSpeed("lossless", 2e-9, 1.5e-9, 3.39), CodecSpeed("bits:2.0", 3e-9, 1.7e-9, 0.2505))
    line = Line(0.0, 1.0)
    found = Measurements((1, 1), line, line, None, None, (), codecs, 0.0, contended=True)
    return assumed_network(found, 100e6 / 8, 4, 1, latency)


def train(
    rank: int, bits: Any, how: str | None, sgd: bool = False, restart_at: int = -1, **options: Any
) -> dict[str, Any]:
    """A few steps; restart_at: before which everything is made anew, and the state of compression restored."""
    model = ddp()
    kind = torch.optim.SGD if sgd else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=0.01)
    compression = edl.compress(model, optimizer, bits, check_every=1, hierarchy=how, **options)
    generator = torch.Generator().manual_seed(100 + rank)
    for step in range(STEPS):
        if step == restart_at:
            state, parameters = compression.state_dict(), [p.detach().clone() for p in model.parameters()]
            compression.close()
            model = ddp()
            with torch.no_grad():
                for p, saved in zip(model.parameters(), parameters, strict=True):
                    p.copy_(saved)
            optimizer = kind(model.parameters(), lr=0.01)
            compression = edl.compress(model, optimizer, bits, check_every=1, hierarchy=how, **options)
            compression.load_state_dict(state)
        optimizer.zero_grad()
        x = torch.randn(16, 48, generator=generator)
        (model(x) - x[:, :10]).square().mean().backward()
        optimizer.step()
    found = {
        "parameters": torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
        "stats": compression.stats(),
        "total": compression.stats(all_ranks=True),
    }
    compression.close()
    return found


def several(rank: int) -> dict[str, dict[str, Any]]:
    """Several runs in the same processes, for starting them takes longest."""
    planned = {"measurements": network(0.05), "floor_bits": 2.0, "replan": False}
    return {
        "identity": train(rank, "identity", "groups:2"),
        "lossless": train(rank, "lossless", "groups"),
        "lossy": train(rank, 2.0, "groups:2"),
        "flat": train(rank, "identity", None),
        "fed back": train(rank, 1.0, "groups:2", sgd=True),  # a common step, and error feedback
        "resumed": train(rank, 1.0, "groups:2", sgd=True, restart_at=3),
        "planned": train(rank, "auto", "groups", **planned),
    }


def test_ranks_in_groups_end_bitwise_equal_lossless_with_the_bits_of_identity() -> None:
    results = run_ranks(several, 4)
    for name in results[0]:
        parameters: list[Tensor] = [result[name]["parameters"] for result in results]
        assert all(same_bits(parameters[0], other) for other in parameters[1:]), name
        assert results[0][name]["stats"]["checks"] >= STEPS - 3
    one = results[0]
    assert one["fed back"]["stats"]["scale"] == "global" and one["fed back"]["stats"]["error_feedback"]
    assert same_bits(one["fed back"]["parameters"], one["resumed"]["parameters"])
    assert same_bits(one["identity"]["parameters"], one["lossless"]["parameters"])
    assert not same_bits(one["lossy"]["parameters"], one["lossless"]["parameters"])
    assert one["identity"]["total"]["ratio"] == 1.0 < one["lossless"]["total"]["ratio"]
    assert one["identity"]["total"]["values_sent"] == one["flat"]["total"]["values_sent"]
    assert one["identity"]["total"]["wire_bytes"] < one["flat"]["total"]["wire_bytes"]  # fewer headers
    assert one["lossy"]["stats"]["hierarchy"] == {
        "ranks_per_group": [2, 2],
        "source": "groups of 2 ranks, as asked for",
        "flat_because": None,
    }
    assert one["planned"]["stats"]["bits"] == "2.0"
    assert one["planned"]["stats"]["plans"][0]["group_size"] == 2
    assert "groups of 2 need 4 messages" in one["planned"]["stats"]["reason"]


def leaving(rank: int, victim: int) -> None:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edl.compress(model, optimizer, bits=2.0, timeout=60.0, hierarchy="groups:2")
    for number in range(6):
        if rank == victim and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model(torch.randn(8, 48)).square().mean().backward()
        optimizer.step()


def test_a_killed_rank_is_named_on_every_rank_of_every_group() -> None:
    for outcome in run_failing_ranks(leaving, 4, 3)[:3]:
        assert isinstance(outcome.error, TransportError), outcome
        assert f"rank {outcome.rank} lost rank 3 " in str(outcome.error)
        assert outcome.seconds < SOON


def test_ranks_that_wish_for_other_groups_are_named_and_impossible_ones_refused() -> None:
    for outcome in run_failing_ranks(wishes, 2, [None, "groups"]):
        assert isinstance(outcome.error, PlanMismatch)
        assert "hierarchy = groups [[0, 1]] (rank 1), None (rank 0)" in str(outcome.error)


@pytest.mark.parametrize("how", ["groups:3", "groups:0", "group"])
def test_impossible_groups_are_refused(how: str) -> None:
    (outcome,) = run_failing_ranks(wishes, 1, [how])
    assert isinstance(outcome.error, ConfigError)
