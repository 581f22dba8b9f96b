"""A sharded model with bits="auto" goes on with the plans it was saved with, whatever the links are like now."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import efficient_dl as edl
from efficient_dl.errors import EdlError, PlanMismatch
from tests.distributed.launch import run_ranks
from tests.distributed.measured_links import measuring, network
from tests.distributed.rules import log_lines
from tests.distributed.sharded_model import full, same_bits, sharded, step

SLOW, FAST = network((1, 1), 0.5, family="bits"), network((1, 1), 1e6, family="bits")


def start(links: Any, replicas: int, **options: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    mesh = None
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("replicas", "shards"))
    model = sharded(mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with measuring(links):
        return (
            model,
            optimizer,
            edl.compress(model, optimizer, **{"bits": "auto", "check_every": 2, **options}),
        )


def bits_of(compression: Any) -> tuple[str, str, str]:
    return compression.plan.bits, compression.replicas_plan.bits, compression.weights_plan.bits


def resumed(rank: int, before: Any, now: Any, replicas: int) -> dict[str, Any]:
    """Six steps, and the last three of them once more from what was saved, after another measurement."""
    model, optimizer, compression = start(before, replicas)
    for number in range(6):
        if number == 3:
            shards = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}
            moments = copy.deepcopy(optimizer.state_dict())
            saved = copy.deepcopy(compression.state_dict())
        step(rank, number, model, optimizer)
    whole, stats = full(model), compression.stats()
    seen: dict[str, Any] = {"before": bits_of(compression)}
    compression.close()
    model, optimizer, compression = start(now, replicas)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.to_local().copy_(shards[name])
    optimizer.load_state_dict(moments)
    seen["now"] = bits_of(compression)
    with log_lines() as lines:
        compression.load_state_dict(saved)
    seen["lines"], seen["after"] = lines, bits_of(compression)
    for number in range(3, 6):
        step(rank, number, model, optimizer)
    again = compression.stats()
    seen["same"] = (
        same_bits(full(model), whole),
        all(
            again[key] == stats[key]
            for key in ("wire_bytes", "native_bytes", "steps", "parameters", "reason")
        ),
    )
    compression.close()
    if replicas == 1:
        seen |= others(rank, before, saved)
    return seen


def others(rank: int, before: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """What a state meets if the user wants other bits now, if a rank was given another run's, or on another mesh."""
    seen: dict[str, Any] = {}
    foreign = {**saved, "auto": None} if rank == 1 else saved
    for name, options, state in (
        ("fixed", {"bits": 3.0, "weights": "identity"}, saved),
        ("floor", {"floor_bits": 5.0}, saved),
        ("mixed", {}, foreign),
        ("resized", {}, {**saved, "world_size": 3}),
    ):
        _, _, compression = start(before, 1, **options)
        with log_lines() as lines:
            try:
                compression.load_state_dict(state)
                seen[name] = lines
            except EdlError as error:
                seen[name] = error
        compression.close()
    return seen


@pytest.mark.parametrize(
    ("before", "now", "replicas"),
    [(SLOW, FAST, 1), (FAST, SLOW, 1), (SLOW, FAST, 2)],
    ids=["slow, then fast", "fast, then slow", "slow, then fast, with replicas"],
)
def test_a_resumed_run_keeps_the_plans_that_auto_chose_before(before: Any, now: Any, replicas: int) -> None:
    slow = ("2.0", "2.0" if replicas > 1 else "none", "lossless")
    fast = ("none", "none", "none")
    for rank, seen in enumerate(run_ranks(resumed, 2 * replicas, before, now, replicas)):
        assert seen["before"] == seen["after"] == (slow if before is SLOW else fast)
        assert seen["now"] == (slow if now is SLOW else fast)
        assert seen["same"] == (True, True)
        said = [line for line in seen["lines"] if "the plan it was saved with; this start alone" in line]
        assert len(said) == (rank == 0), seen["lines"]
        if replicas == 1 and before is SLOW:
            assert isinstance(seen["fixed"], PlanMismatch) and "codec = bits:2.0 (checkpoint)" in str(
                seen["fixed"]
            )
            assert isinstance(seen["floor"], PlanMismatch) and "codec = bits:2.0 (checkpoint)" in str(
                seen["floor"]
            )
            assert isinstance(seen["mixed"], PlanMismatch) and "checkpoint.auto = None (rank 1)" in str(
                seen["mixed"]
            )
            assert any("with the plans of this start" in line for line in seen["resized"])
