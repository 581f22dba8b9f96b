"""A run with bits="auto" changes its plan on all ranks after the same step, loses nothing, and resumes exactly."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.comm import look
from efficient_dl.comm.look import Allowance
from efficient_dl.comm.measurements import CodecSpeed, Measurements
from efficient_dl.comm.replanning import Hysteresis
from efficient_dl.errors import ConfigError, PlanMismatch, TransportError
from efficient_dl.integrations.plan_watch import ReplanOptions
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.measured_links import network

EAGER = ReplanOptions(hysteresis=Hysteresis(distance_steps=0), allowance=Allowance(share=1000.0))
NEVER = ReplanOptions(allowance=Allowance(share=0.0, looks=0.0))


def made(measurements: Measurements, options: ReplanOptions, **more: Any) -> tuple[Any, Any, edl.Compression]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 5))
    model = DistributedDataParallel(net, bucket_cap_mb=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # its residuals are fed back
    wishes = {"check_every": 10, "scale": "global", **more}
    compression = edl.compress(model, optimizer, "auto", replan=options, measurements=measurements, **wishes)
    assert isinstance(compression, edl.Compression)
    return model, optimizer, compression


def train(rank: int, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(1000 * step + rank)
        model(torch.randn(8, 20, generator=generator)).square().mean().backward()
        optimizer.step()


# -------------------------------------------------------------------- by measurements
def measured(rank: int) -> tuple[list[dict[str, Any]], dict[str, Any], list[Tensor]]:
    """Planned for a slow link; the loopback interface is none, and its transfers hide behind a long backward pass."""
    model, optimizer, compression = made(network((1, 1), 0.5, backward=0.5), EAGER)
    train(rank, model, optimizer, 0, 80)
    compression.check()
    stats = compression.stats()
    compression.close()
    return stats["plans"], stats, [p.detach() for p in model.parameters()]


def test_a_link_that_became_fast_takes_all_ranks_to_native_after_the_same_step() -> None:
    (plans, stats, weights), (others, _, their_weights) = run_ranks(measured, 2)
    assert plans == others
    first, second = plans
    assert (first["step"], first["bits"]) == (0, "2.0")
    assert second["bits"] == "none" and second["step"] > 0 and second["step"] % 10 == 0
    assert second["reason"].startswith("switched from 2.0 bits: native: a step of")
    assert (stats["bits"], stats["bytes_source"]) == ("none", "counted")
    assert stats["looks"] >= 2
    assert 0 < stats["native_bytes"] < stats["wire_bytes"]
    assert all(torch.equal(a, b) for a, b in zip(weights, their_weights, strict=True))


def sparing(rank: int) -> tuple[list[dict[str, Any]], int]:
    model, optimizer, compression = made(network((1, 1), 0.5, backward=0.5), NEVER)
    train(rank, model, optimizer, 0, 60)
    stats = compression.stats()
    return stats["plans"], stats["looks"]


def test_nothing_is_looked_at_without_an_allowance() -> None:
    for plans, looks in run_ranks(sparing, 2):
        assert [one["bits"] for one in plans] == ["2.0"] and looks == 0


def bounded(rank: int) -> tuple[str, str, bool, bool]:
    """Planned where sizes are dear to tell; gone on with where they are cheap."""
    links = network((1, 1), 0.5, backward=0.5, family="bits")
    native, exchange = (
        dataclasses.replace(line, latency_seconds=seconds)
        for line, seconds in ((links.native, 0.3), (links.exchange, 0.1))
    )
    dear = dataclasses.replace(links, native=native, exchange=exchange, told_seconds=0.09)
    model, optimizer, compression = made(dear, NEVER, scale="local")
    train(rank, model, optimizer, 0, 10)
    state, first = compression.state_dict(), compression.stats()["messages"]
    compression.close()
    model, optimizer, compression = made(links, NEVER, scale="local")
    fresh = compression.stats()["messages"]
    compression.load_state_dict(state)
    train(rank, model, optimizer, 10, 20)
    stats = compression.stats()
    compression.close()
    return first, fresh, stats["messages"] == "bounded", stats["plans"][-1]["bounded"]


def test_bounded_messages_are_planned_where_they_pay_and_a_resumed_run_keeps_them() -> None:
    assert run_ranks(bounded, 2) == [("bounded", "exact", True, True)] * 2


def broken_look(rank: int, nodes: tuple[int, ...]) -> None:
    model, optimizer, _ = made(
        network(nodes, 0.5, backward=0.5), EAGER, hierarchy=nodes[0] if nodes[0] > 1 else None, timeout=300.0
    )
    if rank == 1:
        look.codec_speed = no_memory
    train(rank, model, optimizer, 0, 80)


def no_memory(*arguments: object) -> CodecSpeed:
    raise MemoryError("a test")


@pytest.mark.parametrize("nodes", [(1, 1, 1), (2, 2)], ids=str)
def test_a_rank_that_fails_in_a_look_is_named_by_the_others_long_before_the_time_out(
    nodes: tuple[int, ...],
) -> None:
    failed = run_failing_ranks(broken_look, sum(nodes), nodes, timeout=150.0)
    assert isinstance(failed[1].error, MemoryError), failed[1]
    for rank in set(range(sum(nodes))) - {1}:
        error = failed[rank].error
        assert isinstance(error, TransportError) and "rank 1" in str(error), failed[rank]


# -------------------------------------------------------------------- residuals
class Constant(nn.Module):
    """A gradient that is always the same: the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5000))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def row(step: int, bits: str, by_nodes: bool = False) -> dict[str, Any]:
    """As `stats()["plans"]` has it."""
    return {"step": step, "bits": bits, "hierarchy": by_nodes, "reason": "a test"}


def drained(rank: int, plans: list[tuple[int, str, bool]], nodes: tuple[int, ...]) -> tuple[float, ...]:
    model = DistributedDataParallel(Constant())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    compression: Any = edl.compress(
        model,
        optimizer,
        "auto",
        measurements=network(nodes, 0.5),
        replan=NEVER,
        check_every=1,
        scale="global",
        hierarchy=nodes[0] if nodes[0] > 1 else None,
    )
    first = compression.plans[0]
    compression.replay([row(step, bits, by_nodes) for step, bits, by_nodes in plans], 100)
    inputs = [torch.randn(5000, generator=torch.Generator().manual_seed(one)) for one in range(sum(nodes))]
    mean = torch.stack(inputs).mean(0)
    steps, errors = plans[-1][0] + 1, []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(inputs[rank]).backward()
        optimizer.step()
        missing = model.module.weight + step * mean
        errors.append(float(missing.norm() / mean.norm()))
    norm = compression.stats(all_ranks=True)["parameters"]["weight"]["residual_norm"]
    assert first["bits"] == "2.0"
    return errors[plans[0][0] - 1], errors[-1], norm


@pytest.mark.parametrize(
    ("plans", "nodes"),
    [
        ([(4, "none", False)], (1, 1)),
        ([(4, "lossless", False)], (1, 1)),
        ([(3, "4.0", False), (6, "none", False)], (1, 1)),
        ([(3, "none", False), (5, "2.0", False), (8, "none", False)], (1, 1)),
        ([(3, "2.0", False), (6, "2.0", True), (9, "none", False)], (2, 2)),
    ],
    ids=["native", "lossless", "another rate", "to and fro", "flat, between nodes"],
)
def test_after_a_switch_no_part_of_any_gradient_is_missing(
    plans: list[tuple[int, str, bool]], nodes: tuple[int, ...]
) -> None:
    """While 2 bits are sent, something is; the step after the switch brings it, and nothing is kept any more."""
    for before, after, norm in run_ranks(drained, sum(nodes), plans, nodes):
        assert before > 0.01
        assert after < 1e-5
        assert norm == 0.0


# -------------------------------------------------------------------- resumes
PLANS = [
    row(10, "4.0"),
    row(20, "none"),
    row(40, "2.0"),
    row(50, "lossless"),
]


def resumed(rank: int, bandwidth: float) -> list[tuple[int, bool, bool]]:
    """From every tenth step: whether weights and plans are those of the run that went on."""
    model, optimizer, compression = made(network((1, 1), bandwidth), NEVER)
    compression.replay(PLANS, 60)
    saved = {}
    for step in range(0, 60, 5):
        train(rank, model, optimizer, step, step + 5)
        saved[step + 5] = copy.deepcopy(
            (model.state_dict(), optimizer.state_dict(), compression.state_dict())
        )
    whole, plans = model.state_dict(), [(one["step"], one["bits"]) for one in compression.plans]
    compression.close()
    seen = []
    for step in (5, 10, 15, 20, 25, 40, 45, 50, 55):
        model, optimizer, compression = made(network((1, 1), 100_000, 1e3), NEVER)  # it would be native
        for one, state in zip((model, optimizer, compression), saved[step], strict=True):
            one.load_state_dict(state)
        compression.replay([one for one in PLANS if one["step"] > step], 60)
        train(rank, model, optimizer, step, 60)
        same = all(torch.equal(a, whole[name]) for name, a in model.state_dict().items())
        seen.append((step, same, [(one["step"], one["bits"]) for one in compression.plans] == plans))
        compression.close()
    return seen


@pytest.mark.parametrize("bandwidth", [0.5, 1e6], ids=["from 2 bits", "from native"])
def test_a_run_resumed_before_or_after_any_switch_is_one_that_never_stopped(bandwidth: float) -> None:
    for seen in run_ranks(resumed, 2, bandwidth):
        assert all(same and plans for _, same, plans in seen), seen


def of_two_steps(rank: int) -> None:
    model, optimizer, compression = made(network((1, 1), 0.5), NEVER)
    states = []
    for step in range(2):
        states.append(compression.state_dict())
        train(rank, model, optimizer, step, step + 1)
    compression.load_state_dict(states[rank])


def test_ranks_with_states_of_different_steps_are_told_before_they_make_groups() -> None:
    for failed in run_failing_ranks(of_two_steps, 2):
        assert isinstance(failed.error, PlanMismatch), failed
        assert "checkpoint.step = 1 (rank 1), 0 (rank 0)" in str(failed.error)


def repeats_nothing(rank: int) -> None:
    _, _, compression = made(network((1, 1), 0.5), ReplanOptions(active=False))
    assert not compression.replans
    compression.replay(compression.plans, 10)


def test_a_run_that_does_not_change_its_plans_cannot_repeat_changes() -> None:
    for failed in run_failing_ranks(repeats_nothing, 2):
        assert isinstance(failed.error, ConfigError), failed
        assert "does not change its plans" in str(failed.error)


def on_fewer(rank: int, states: list[dict[str, Any]]) -> tuple[list[tuple[int, str]], bool, float]:
    model, optimizer, compression = made(network((1, 1), 100_000, 1e3), NEVER)
    compression.load_state_dict(states)
    draining = compression.state_dict()["compressor"]["residuals"]["draining"]
    train(rank, model, optimizer, 10, 12)
    norms = [row["residual_norm"] for row in compression.stats()["parameters"].values()]
    return [(one["step"], one["bits"]) for one in compression.plans], draining, max(norms)


def saving(rank: int) -> dict[str, Any]:
    model, optimizer, compression = made(network((1, 1, 1), 0.5), NEVER)
    train(rank, model, optimizer, 0, 10)
    return compression.state_dict()


def test_on_another_number_of_ranks_the_new_plan_takes_over_with_the_residuals() -> None:
    states = run_ranks(saving, 3)
    for plans, draining, norm in run_ranks(on_fewer, 2, states):
        assert plans == [(0, "2.0"), (10, "none")]
        assert draining and norm == 0.0
