"""The probe measures on all ranks, all get the same numbers, and a rank that is gone ends it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.comm import ProcessGroupTransport, Topology
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import PlannerOptions
from efficient_dl.errors import ConfigError, TransportError
from efficient_dl.integrations.auto import AutoOptions, decide
from tests.distributed.launch import run_failing_ranks, run_ranks


def parameters() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.zeros(numel)) for name, numel in (("a", 70_000), ("b", 300), ("c", 30_001))
    }


def measured(rank: int, nodes: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    control = ProcessGroupTransport(dist.new_group(), timeout=60.0)
    options = AutoOptions(backward_seconds=0.25 * (1 + rank), planner=PlannerOptions(hierarchy=True))
    topology = Topology(nodes, "this test")
    measurements, decision = decide(parameters(), control, control, topology, options)
    return {"measurements": measurements, "decision": decision}


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [((0,), (1,), (2,)), ((0, 1), (2,))])
def test_all_ranks_get_the_same_measurements_and_decision(nodes: tuple[tuple[int, ...], ...]) -> None:
    first, *others = run_ranks(measured, 3, nodes)
    assert all(other == first for other in others)
    found: Measurements = first["measurements"]
    assert found.backward_seconds == 0.75  # the slowest rank's
    count = len(nodes)
    assert [(link.source, link.target) for link in found.links] == [
        (a, b) for a in range(count) for b in range(count) if a != b
    ]
    assert [one.codec for one in found.codecs] == ["lossless", "bits:4.0", "bits:2.0"]
    assert [one.bytes_per_value for one in found.codecs] == sorted(
        (one.bytes_per_value for one in found.codecs), reverse=True
    )
    assert found.codecs[2].bytes_per_value * 8 == pytest.approx(2.0, abs=0.15)
    assert all(
        line.bytes_per_second > 0 and line.latency_seconds > 0 for line in (found.native, found.exchange)
    )
    assert found.between is None  # nodes with one rank each, or with different numbers of them
    assert Measurements.from_json(found.to_json()) == found


def gone(rank: int) -> None:
    control = ProcessGroupTransport(dist.new_group(), timeout=5.0)
    dist.barrier()
    if rank == 1:
        os._exit(3)
    decide(parameters(), control, control, Topology(((0,), (1,)), "this test"), AutoOptions())


def test_a_rank_that_is_gone_ends_the_probe() -> None:
    outcomes = run_failing_ranks(gone, 2)
    assert isinstance(outcomes[0].error, TransportError)


def trained(rank: int) -> list[dict[str, Any]]:
    """Backward that takes no time against codecs that do, on no network: native. Then the plan is applied."""
    seen = []
    for kind, options in (
        (torch.optim.AdamW, {"backward_seconds": 100.0, "overrides": {"*.bias": "none"}}),
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {"shadow": True}),
    ):
        torch.manual_seed(rank)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 300), nn.Linear(300, 5)))
        optimizer = kind(model.parameters(), lr=0.1)
        compression = edl.compress(model, optimizer, "auto", check_every=1, floor_bits=3.0, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 20)).sum().backward()
            optimizer.step()
        stats = compression.stats()
        seen.append({key: stats[key] for key in ("bits", "reason", "steps")})
        compression.close()
    dist.barrier()
    return seen


def test_compress_applies_what_auto_chose_and_says_why() -> None:
    (auto, fed, shadow), others = run_ranks(trained, 2)
    assert [auto, fed, shadow] == others
    assert auto["bits"] in ("none", "lossless", "4.0", "3.0")
    assert "backward takes 100,000 ms" in auto["reason"]
    assert "the floor is 3 bits" in auto["reason"]
    assert (auto["bits"] == "none") == ("overrides without effect" in auto["reason"])
    assert ("error feedback" in auto["reason"], "error feedback" in fed["reason"]) == (False, True)
    assert auto["steps"] == fed["steps"] == shadow["steps"] == 3


def sharded(rank: int) -> list[dict[str, Any]]:
    """Shards; then two replicas of two shards, of which "auto" is left one axis; shards with error feedback; then the
    shadow, unmeasured."""
    seen = []
    for replicas, options in (
        (1, {"floor_bits": 3.0, "overrides": {"*.bias": "none"}}),
        (2, {"floor_bits": 3.0, "axes": {"shard": "identity"}, "weights": "identity"}),
        (1, {"floor_bits": 3.0, "error_feedback": True}),
        (1, {"shadow": True}),
    ):
        torch.manual_seed(1)
        model: Any = nn.Sequential(nn.Linear(20, 300), nn.Linear(300, 5))
        shape = (4,) if replicas == 1 else (replicas, 4 // replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        compression: Any = edl.compress(model, optimizer, "auto", check_every=1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 20) + rank).sum().backward()
            optimizer.step()
        stats = compression.stats()
        seen.append({key: stats[key] for key in ("bits", "weights_bits", "replicas_bits", "steps", "checks")})
        plans = (compression.plan, compression.replicas_plan, compression.weights_plan)
        seen[-1]["reasons"] = [plan.reason for plan in plans]
        compression.close()
    return seen


@pytest.mark.slow
def test_auto_measures_each_axis_of_a_sharded_model_and_its_weights() -> None:
    first, *others = run_ranks(sharded, 4)
    assert all(other == first for other in others)
    shards, hybrid, fed, shadow = first
    gradients, _, weights = shards["reasons"]
    assert shards["bits"] in ("none", "lossless", "4.0", "3.0")
    assert shards["weights_bits"] in ("none", "lossless")
    assert "the floor is 3 bits" in gradients
    assert (shards["bits"] == "none") == ("overrides without effect" in gradients)
    assert "a step of" in weights and "4.0 bits" not in weights
    assert (hybrid["bits"], hybrid["weights_bits"]) == ("identity", "identity")
    assert hybrid["replicas_bits"] in ("none", "lossless", "4.0", "3.0")
    assert "a step of" in hybrid["reasons"][1]
    assert (shadow["bits"], shadow["weights_bits"]) == ("auto", "lossless")
    assert "where no planner measures" in shadow["reasons"][0]
    assert ["error feedback" in reason for reason in shards["reasons"]] == [False] * 3
    assert ["error feedback" in reason for reason in fed["reasons"]] == [True, False, False]
    assert [run["steps"] for run in first] == [3, 3, 3, 3]


def mixed(rank: int) -> str:
    """One unit whose weights have two dtypes: torch gathers them, and no codec takes them."""
    torch.manual_seed(1)
    model: Any = nn.Sequential(
        nn.Linear(20, 30), nn.Linear(30, 5, dtype=torch.bfloat16).requires_grad_(False)
    )
    fully_shard(model)
    compression: Any = edl.compress(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    bits = compression.stats()["weights_bits"]
    dist.barrier()  # a rank that leaves early breaks the other's connections
    compression.close()
    return bits


def test_auto_measures_no_weights_that_no_codec_takes() -> None:
    assert run_ranks(mixed, 2) == ["lossless", "lossless"]


def impossible(rank: int) -> None:
    model = DistributedDataParallel(nn.Linear(4, 1))
    edl.compress(model, floor_bits=0.0 if rank else 2.0)


def test_an_impossible_floor_on_one_rank_stops_all() -> None:
    first, second = run_failing_ranks(impossible, 2)
    assert isinstance(second.error, ConfigError)
    assert "rank 1 cannot start: ConfigError" in str(first.error)
