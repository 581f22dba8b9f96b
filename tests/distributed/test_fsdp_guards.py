"""Sharded models with error feedback, in the shadow, with alarms, and with the kill switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import efficient_dl as edl
from tests.distributed.launch import run_ranks
from tests.distributed.sharded_model import full, same_bits, sharded, step

ROWS, COLUMNS = 40, 96


def small(replicas: int = 1) -> Any:
    """One unit, whose gradients are the same in every step and differ between ranks."""
    torch.manual_seed(3)
    model = nn.Linear(COLUMNS, ROWS)
    mesh = None
    if replicas > 1:
        shards = torch.distributed.get_world_size() // replicas
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicas", "shards"))
    return fully_shard(model, mesh=mesh)


def pass_of(rank: int, model: Any, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5, COLUMNS, generator=generator)
    return (model(x) * torch.randn(5, ROWS, generator=generator)).sum() * scale


def after_steps(rank: int, options: dict[str, Any] | None, replicas: int) -> dict[str, Tensor]:
    model = small(replicas)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if options is not None:
        edl.compress(model, optimizer, check_every=10, **options)
    for _ in range(16):
        optimizer.zero_grad()
        pass_of(rank, model).backward()
        optimizer.step()
    return full(model)


def fed_back(rank: int, options: dict[str, Any], replicas: int = 1) -> list[dict[str, Tensor]]:
    runs = (None, options, {**options, "error_feedback": True})
    return [after_steps(rank, one, replicas) for one in runs]


@pytest.mark.parametrize(
    ("world_size", "replicas", "axes"), [(3, 1, None), (4, 2, {"shard": "none"}), (4, 2, None)]
)
def test_error_feedback_brings_back_what_packets_leave_out(
    world_size: int, replicas: int, axes: dict[str, str] | None
) -> None:
    exact, lossy, fed = run_ranks(fed_back, world_size, {"bits": 0.5, "axes": axes}, replicas)[0]
    error_without = float((lossy["weight"] - exact["weight"]).norm())
    assert float((fed["weight"] - exact["weight"]).norm()) < 0.4 * error_without


def residual_sizes(rank: int) -> tuple[int, int, dict[str, Any]]:
    """Values of residuals that a rank keeps, and those of its shard."""
    model = small(replicas=2)
    options: dict[str, Any] = {"bits": 1.0, "axes": {"shard": "none"}, "error_feedback": True}
    compression = edl.compress(model, **options)
    pass_of(rank, model).backward()
    kept = compression.state_dict()["replicas"]["residuals"]["parameters"].values()
    own = sum(p.to_local().numel() for p in model.parameters())
    return sum(values.numel() for values in kept), own, compression.stats()["parameters"]


def test_residuals_between_replicas_take_the_size_of_the_own_shard() -> None:
    for kept, own, rows in run_ranks(residual_sizes, 4):
        assert kept == own
        assert rows["weight"]["residual_norm"] > 0.0


def with_skipped_steps(rank: int, skips: bool) -> dict[str, Tensor]:
    """Six steps, after two of which a third overflows on rank 0; or a scale that falls without it."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    edl.compress(model, optimizer, 1.0, error_feedback=True, scaler=scaler)
    for number in range(6):
        if number == 2:
            if skips:
                optimizer.zero_grad()
                scaler.scale(pass_of(rank, model, torch.inf if rank == 0 else 1.0)).backward()
                scaler.step(optimizer)
            scaler.update(None if skips else 32.0)
        optimizer.zero_grad()
        scaler.scale(pass_of(rank, model)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 32.0
    return full(model)


def skipped_or_not(rank: int) -> list[dict[str, Tensor]]:
    return [with_skipped_steps(rank, skips) for skips in (True, False)]


def test_a_step_that_the_scaler_skips_leaves_residuals_as_if_it_had_not_run() -> None:
    skipped, never = run_ranks(skipped_or_not, 2)[1]
    assert same_bits(skipped, never)


def counted(rank: int, options: dict[str, Any] | None, replicas: int) -> tuple[dict[str, Tensor], Any]:
    model = small(replicas) if replicas > 1 else sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compression: Any = None
    if options is not None:
        compression = edl.compress(model, optimizer, check_every=0, **options)
    for number in range(3):
        optimizer.zero_grad()
        if replicas > 1:
            pass_of(rank, model).backward()
            optimizer.step()
        else:
            step(rank, number, model, optimizer)
    return full(model), compression and compression.stats()


def shadowed(rank: int, replicas: int) -> list[Any]:
    runs = (None, {"bits": 2.0, "shadow": True}, {"shadow": True, "bits": "lossless"}, {"bits": "lossless"})
    return [counted(rank, one, replicas) for one in runs]


@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (4, 2)])
def test_the_shadow_applies_native_bits_and_counts_what_compression_would_send(
    world_size: int, replicas: int
) -> None:
    """Two ranks on each axis sum up to the same bits natively and losslessly, so the counts are equal, too."""
    for native, lossy, lossless, real in run_ranks(shadowed, world_size, replicas):
        assert same_bits(lossy[0], native[0])
        assert same_bits(lossless[0], native[0])
        assert lossy[1]["gradients"]["ratio"] > 4.0
        assert lossy[1]["gradients"]["relative_error"] > 0.1
        assert lossy[1]["bytes_source"] == "shadow"
        for kind in ("gradients", "weights", "replicas"):
            for key in ("wire_bytes", "raw_bytes", "values_sent", "encoded_bits"):
                assert lossless[1][kind][key] == real[1][kind][key], (kind, key)
        assert (lossless[1]["replicas"]["wire_bytes"] > 0) == (replicas > 1)


def switched_off(rank: int, by: str) -> tuple[dict[str, Tensor], Any, Any]:
    """Rank 3 of two replicas of two shards wishes in its third step; ranks compare after the fourth of six."""
    model = small(replicas=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compression = edl.compress(model, optimizer, 1.0, weights=6.0, check_every=4)
    for number in range(6):
        if by == "disable" and rank == 3 and number == 2:
            compression.disable("it looks wrong")
        if by == "close" and number == 4:
            compression.close()
        if number == 4:
            before = compression.stats()
        optimizer.zero_grad()
        pass_of(rank, model).backward()
        optimizer.step()
    after = compression.stats()
    if by == "disable":
        for key in ("encoded_values", "encoded_bits"):
            assert after[key] == before[key]  # nothing is encoded any more
        again = small(replicas=2)
        restored = edl.compress(again, torch.optim.SGD(again.parameters(), lr=0.1), 1.0, weights=6.0)
        restored.load_state_dict(compression.state_dict())
        pass_of(rank, again).backward()
        assert restored.stats()["encoded_values"] == after["encoded_values"]
    return full(model), before, after


def test_one_rank_ends_compression_on_all_ranks_after_the_same_step() -> None:
    disabled, closed = run_ranks(switched_off, 4, "disable"), run_ranks(switched_off, 4, "close")
    for (parameters, before, after), (native, *_) in zip(disabled, closed, strict=True):
        assert same_bits(parameters, native)
        assert after["disabled"] == {"step": 4, "reason": "rank 3: it looks wrong"}
        assert before["native_bytes"] == 0 < after["native_bytes"]
        assert after["replica_wire_bytes"] > before["replica_wire_bytes"] == 0


def alarmed(rank: int) -> dict[str, Any]:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"max_relative_error": 0.05, "on_alarm": "disable", "check_every": 5}
    compression = edl.compress(model, optimizer, 1.0, **options)
    for _ in range(26):
        optimizer.zero_grad()
        pass_of(rank, model).backward()
        optimizer.step()
    return compression.stats()


def test_an_alarm_about_errors_can_end_compression() -> None:
    for stats in run_ranks(alarmed, 2):
        found = [alarm for alarm in stats["alarms"] if alarm["kind"] == "error"]
        assert found[0]["about"] == "gradients"
        assert "over the limit of 0.05" in found[0]["text"]
        assert stats["disabled"]["step"] == 20
