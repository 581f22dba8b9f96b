"""A compressor's state is restored exactly, or refused."""

from __future__ import annotations

import json

import pytest
import torch

from efficient_dl.comm import BucketLayout, Compressor, Meter, Plan, Transport, all_reduce, combined, summary
from efficient_dl.errors import CheckpointError, PlanMismatch
from tests.unit.ranks import on_ranks


def used_compressors() -> list[Compressor]:
    def rank(transport: Transport) -> Compressor:
        compressor = Compressor(Plan.of(2.0), ["a", "b"], "reference")
        x = torch.randn(1300, generator=torch.Generator().manual_seed(transport.rank))
        all_reduce(x, BucketLayout.of(["b", "a"], [1000, 300], 2), compressor, transport)
        compressor.meter.stepped(0.25)
        return compressor

    return on_ranks(2, rank)


def test_state_is_restored_exactly_even_through_json() -> None:
    used = used_compressors()[1]
    state = json.loads(json.dumps(used.state_dict()))
    fresh = Compressor(Plan.of(2.0), ["b", "a"], "reference")
    fresh.load_state_dict(state)
    assert fresh.state_dict()["meter"]["totals"] == used.state_dict()["meter"]["totals"]
    assert fresh.state_dict()["meter"]["parameters"] == used.state_dict()["meter"]["parameters"]
    assert summary(fresh.meter.state_dict()) == summary(used.meter.state_dict())


def test_state_of_another_plan_is_refused() -> None:
    state = used_compressors()[0].state_dict()
    with pytest.raises(PlanMismatch, match=r"codec = bits:2.0 \(checkpoint\), bits:1.5 \(run\)"):
        Compressor(Plan.of(1.5), ["a", "b"], "reference").load_state_dict(state)


def test_state_of_another_model_is_refused() -> None:
    state = used_compressors()[0].state_dict()
    with pytest.raises(CheckpointError, match="'c'"):
        Compressor(Plan.of(2.0), ["a", "b", "c"], "reference").load_state_dict(state)


def test_state_of_another_version_is_refused() -> None:
    state = used_compressors()[0].state_dict() | {"version": 99}
    with pytest.raises(CheckpointError, match="99"):
        Compressor(Plan.of(2.0), ["a", "b"], "reference").load_state_dict(state)


def test_ranks_add_up() -> None:
    states = [compressor.meter.state_dict() for compressor in used_compressors()]
    total = combined(states)
    assert total["steps"] == 1
    for name in ("wire_bytes", "values_sent", "encode_seconds"):
        assert total["totals"][name] == sum(state["totals"][name] for state in states)
    assert total["parameters"]["a"]["values_sent"] == sum(s["parameters"]["a"]["values_sent"] for s in states)


def test_a_meter_without_collectives_divides_by_nothing() -> None:
    empty = summary(Meter(["a"]).state_dict())
    assert empty["bits_per_value"] == empty["relative_error"] == empty["wire_bytes_per_step"] == 0.0
    assert empty["ratio"] == 1.0


def test_an_overflowing_gradient_does_not_spoil_the_measured_error() -> None:
    def rank(transport: Transport) -> float:
        compressor = Compressor(Plan.of(2.0), ["a"], "reference")
        layout = BucketLayout.of(["a"], [1024], 2)
        x = torch.randn(1024)
        all_reduce(x, layout, compressor, transport)
        before = summary(compressor.meter.state_dict())["relative_error"]
        x[:] = float("inf")
        all_reduce(x, layout, compressor, transport)
        assert summary(compressor.meter.state_dict())["relative_error"] == before
        return before

    assert all(0 < error < 1 for error in on_ranks(2, rank))
