"""Rates that follow a bound on the error of every packet, or a budget of bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, Plan, Transport, all_reduce, summary
from efficient_dl.comm.meter import Tally
from tests.unit.ranks import on_ranks

NAMES, NUMELS = ["weight", "bias", "head"], [20_000, 300, 9_000]
LAYOUT = BucketLayout.of(NAMES, NUMELS, 2)


def gradient(seed: int, spread: float) -> Tensor:
    """Heavier tails for a larger spread: other rates for the same error."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(sum(NUMELS), generator=generator)
        * torch.randn(sum(NUMELS), generator=generator).mul(spread).exp()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.5, 0.1, 0.02])
def test_no_packet_errs_more_than_the_bound(bound: float, dtype: torch.dtype) -> None:
    compressor = Compressor(Plan.of(max_error=bound), NAMES)
    for step in range(12):
        for shard in LAYOUT.shards:
            x = gradient(step, 0.1 * step)[shard.start : shard.stop].to(dtype)
            room = torch.empty(compressor.max_bytes(shard, dtype), dtype=torch.uint8)
            tally, out = Tally(LAYOUT), torch.empty_like(x, dtype=torch.float32)
            compressor.decode(compressor.encode(x, room, shard, tally, 1), out, shard, tally)
            error = float((out - x.float()).norm() / x.float().norm())
            assert error <= bound * (1 + 1e-5), (step, error)
            if step > 2:
                assert error > 0.6 * bound  # no more bits than it takes
        compressor.end_step(0.0)
    assert summary(compressor.meter.state_dict())["bound_misses"] == 0


def test_a_bound_that_cannot_be_met_is_counted() -> None:
    """Values that all lie in the middle between two steps of the finest quantizer."""
    layout = BucketLayout.of(["weight"], [256], 1)
    (shard,) = layout.shards
    missed = 0
    compressor = Compressor(Plan.of(max_error=0.0125), ["weight"])
    room = torch.empty(compressor.max_bytes(shard, torch.float32), dtype=torch.uint8)
    for value in torch.linspace(1, 2, 97):
        x, out, tally = torch.full((256,), float(value)), torch.empty(256), Tally(layout)
        compressor.decode(compressor.encode(x, room, shard, tally, 1), out, shard, tally)
        above = float((out - x).norm() / x.norm()) > 0.0125
        assert tally.totals.bound_misses == int(above)
        missed += above
    assert missed > 0


@pytest.mark.parametrize("magnitude", [1e-30, 1e-24, 1e-15, 1e19, 1e30])
def test_the_bound_holds_at_extreme_magnitudes(magnitude: float) -> None:
    compressor = Compressor(Plan.of(max_error=0.05), NAMES)
    shard, tally = LAYOUT.shards[0], Tally(LAYOUT)
    x = torch.randn(shard.numel, generator=torch.Generator().manual_seed(1)) * magnitude
    room = torch.empty(compressor.max_bytes(shard, torch.float32), dtype=torch.uint8)
    out = torch.empty_like(x)
    compressor.decode(compressor.encode(x, room, shard, tally, 1), out, shard, tally)
    assert float((out.double() - x.double()).norm() / x.double().norm()) <= 0.05
    assert tally.totals.bound_misses == 0


def test_an_override_with_the_default_rate_is_not_controlled() -> None:
    compressor = Compressor(Plan.of(max_error=0.85, overrides={"head": 2.0}), NAMES)
    shard = LAYOUT.shards[1]
    room = torch.empty(compressor.max_bytes(shard, torch.float32), dtype=torch.uint8)
    for _ in range(6):
        tally = Tally(LAYOUT)
        compressor.encode(gradient(0, 0.1)[shard.start :], room, shard, tally, 1)
    rows = dict(zip(NAMES, tally.parameters, strict=True))
    assert 8 * rows["head"].wire_bytes / rows["head"].values_sent > 1.9
    assert 8 * rows["weight"].wire_bytes / rows["weight"].values_sent < 1.5


def test_a_budget_that_cannot_be_kept_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def rank(transport: Transport) -> int:
        plan = Plan.of(bytes_per_step=2_000, values_per_step=sum(NUMELS), overrides={"head": "none"})
        compressor = Compressor(plan, NAMES)
        for step in range(12):
            all_reduce(gradient(step, 0.5), LAYOUT, compressor, transport)
            compressor.end_step(0.0)
        return summary(compressor.meter.state_dict())["budget_misses"]

    assert all(misses > 0 for misses in on_ranks(2, rank))
    assert sum("bytes_per_step=2000 cannot be kept" in message for message in caplog.messages) == 2


def test_a_non_finite_gradient_does_not_move_the_rates() -> None:
    compressor = Compressor(Plan.of(max_error=0.1), NAMES)
    shard, tally = LAYOUT.shards[0], Tally(LAYOUT)
    room = torch.empty(compressor.max_bytes(shard, torch.float32), dtype=torch.uint8)
    x = gradient(0, 0.1)[: shard.numel]
    compressor.encode(x, room, shard, tally, 1)
    before = compressor.rates.state_dict()
    x[5] = float("inf")
    compressor.encode(x, room, shard, tally, 1)
    assert compressor.rates.state_dict() == before


@pytest.mark.parametrize("budget", [4_000, 20_000])
@pytest.mark.parametrize("overrides", [{}, {"head": 3.0}])
def test_a_budget_of_bytes_is_kept_on_average(budget: int, overrides: dict[str, float]) -> None:
    values = sum(NUMELS)  # what each of two ranks sends: half of them up, half of them down
    if overrides and budget < 5_000:
        budget += 4_000  # the override takes its share first

    def rank(transport: Transport) -> list[int]:
        plan = Plan.of(bytes_per_step=budget, values_per_step=values, overrides=overrides)
        compressor = Compressor(plan, NAMES)
        sent: list[int] = []
        for step in range(12):
            before = compressor.meter.totals.wire_bytes
            all_reduce(gradient(2 * step + transport.rank, 0.5), LAYOUT, compressor, transport)
            compressor.end_step(0.0)
            sent.append(compressor.meter.totals.wire_bytes - before)
        return sent

    for sent in on_ranks(2, rank):
        assert abs(sum(sent[4:]) / len(sent[4:]) / budget - 1) < 0.05


def test_rates_survive_a_restart() -> None:
    used = Compressor(Plan.of(max_error=0.1), NAMES)
    shard, tally = LAYOUT.shards[1], Tally(LAYOUT)
    room = torch.empty(used.max_bytes(shard, torch.float32), dtype=torch.uint8)
    x = gradient(0, 0.3)[shard.start :]
    used.encode(x, room, shard, tally, 1)
    fresh = Compressor(Plan.of(max_error=0.1), NAMES)
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(
        used.encode(x, room.clone(), shard, tally, 1), fresh.encode(x, room.clone(), shard, tally, 1)
    )
