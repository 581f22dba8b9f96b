"""The state of a compression goes through a checkpoint, or is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.errors import CheckpointError, PlanMismatch, TransportError
from tests.distributed.launch import run_ranks


def compressed(bits: str | float, **options: bool) -> tuple[DistributedDataParallel, Any, edl.Compression]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
    model = DistributedDataParallel(
        net, bucket_cap_mb=0.01, **options
    )  # several buckets, rebuilt after the first step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wishes: dict[str, Any] = {
        "scale": "local",
        "error_feedback": False,
    }  # SGD's own default is in test_ddp_policy.py
    return model, optimizer, edl.compress(model, optimizer, bits, check_every=3, **wishes)


def steps(rank: int, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + rank)
        model(torch.randn(8, 20, generator=generator)).square().mean().backward()
        optimizer.step()


def counted(stats: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stats.items() if "seconds" not in key and key != "checks"}


def interrupted(
    rank: int, bits: str | float, options: dict[str, bool]
) -> tuple[dict[str, Any], dict[str, Any], bool, bool]:
    model, optimizer, compression = compressed(bits, **options)
    steps(rank, model, optimizer, 0, 6)
    whole, straight = counted(compression.stats()), list(model.parameters())

    model, optimizer, compression = compressed(bits, **options)
    steps(rank, model, optimizer, 0, 4)
    saved, weights, moments = compression.state_dict(), model.state_dict(), optimizer.state_dict()
    model, optimizer, compression = compressed(bits, **options)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    compression.load_state_dict(saved)
    exact = compression.state_dict() == saved
    steps(rank, model, optimizer, 4, 6)
    same = all(torch.equal(a, b) for a, b in zip(straight, model.parameters(), strict=True))
    return whole, counted(compression.stats()), exact, same


@pytest.mark.parametrize("bits", ["lossless", 2.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
)
def test_a_resumed_run_is_one_that_was_never_interrupted(bits: str | float, options: dict[str, bool]) -> None:
    for whole, resumed, exact, same in run_ranks(interrupted, 2, bits, options):
        assert exact
        assert same
        assert resumed == whole


def lost_after_resuming(rank: int, state: list[dict[str, Any]]) -> str:
    model, optimizer, compression = compressed(2.0)
    compression.load_state_dict(state[rank])
    if rank == 1:
        return ""
    try:
        steps(rank, model, optimizer, 2, 3)
    except TransportError as error:
        return error.problem
    return "no error"


def test_a_rank_that_is_lost_in_the_first_step_after_resuming_is_named() -> None:
    state = run_ranks(saved_state, 2, 2.0)
    assert run_ranks(lost_after_resuming, 2, state)[0].startswith("rank 0 lost rank 1")


def refusals(rank: int, state: dict[str, Any]) -> list[str]:
    _, _, compression = compressed(2.0)
    other = compression.state_dict()
    cases = [other | {"rank": 1 - rank}, state]
    texts = []
    for case in cases:
        try:
            compression.load_state_dict(case)
        except (CheckpointError, PlanMismatch) as error:
            texts.append(f"{type(error).__name__}: {error}")
    torch.distributed.barrier()  # a rank that leaves early breaks the other's first connection to it
    return texts


def saved_state(rank: int, bits: str | float) -> dict[str, Any]:
    model, optimizer, compression = compressed(bits)
    steps(rank, model, optimizer, 0, 2)
    return compression.state_dict()


def test_another_ranks_or_plans_state_is_refused() -> None:
    state = run_ranks(saved_state, 2, "lossless")[0]
    for rank, texts in enumerate(run_ranks(refusals, 2, {**state, "world_size": 5})):
        assert texts[0].startswith(
            f"CheckpointError: rank {rank} was given the compression state of rank {1 - rank}"
        )
        assert texts[1].startswith("PlanMismatch: the checkpoint was written under another plan")


def one_is_refused(rank: int, state: dict[str, Any]) -> str:
    _, _, compression = compressed(2.0)
    own = compression.state_dict()
    try:
        compression.load_state_dict(own if rank == 0 else state)
    except (CheckpointError, PlanMismatch) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.distributed.barrier()
    return "loaded"


@pytest.mark.parametrize("what", ["rank", "optimizer_steps"])
def test_what_one_rank_is_refused_all_are(what: str) -> None:
    """Else the others would train on, and wait for it."""
    state = run_ranks(saved_state, 2, 2.0)[1]
    for text in run_ranks(one_is_refused, 2, state | {what: 0 if what == "rank" else 77}):
        assert text.startswith(("CheckpointError", "PlanMismatch")), text


def warnings_of(load: Callable[[], None]) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("efficient_dl").addHandler(handler)
    load()
    logging.getLogger("efficient_dl").removeHandler(handler)
    return messages


def restored_in_shadow(rank: int) -> tuple[int, list[str]]:
    model, optimizer, compression = compressed(2.0)
    steps(rank, model, optimizer, 0, 4)
    saved = compression.state_dict()
    model, optimizer, _ = compressed("none")
    ddp = DistributedDataParallel(model.module)
    shadow = edl.compress(ddp, None, 2.0, shadow=True)
    steps(rank, ddp, optimizer, 0, 2)  # what it has sent before belongs to other weights
    messages = warnings_of(lambda: shadow.load_state_dict(saved))
    return shadow.stats()["wire_bytes"], messages


def test_what_a_real_run_sent_is_not_counted_as_shadow() -> None:
    for wire_bytes, messages in run_ranks(restored_in_shadow, 2):
        assert wire_bytes == 0
        assert messages == [
            "compression state of a real run, restored in a shadow: "
            "the byte counters and residuals start again from zero"
        ]


def real_after_shadow(rank: int) -> int:
    """From a shadow run's state; its steps are more than those after which errors are looked at."""
    model, optimizer, _ = compressed("none")
    wishes: dict[str, Any] = {"scale": "local", "error_feedback": False, "check_every": 3}
    model = DistributedDataParallel(model.module)
    shadow = edl.compress(model, optimizer, 2.0, shadow=True, **wishes)
    steps(rank, model, optimizer, 0, 30)
    saved = shadow.state_dict()
    model, optimizer, real = compressed(2.0)
    real.load_state_dict(saved)
    assert real.stats()["steps"] == 0
    steps(rank, model, optimizer, 30, 75)
    return int(real.stats()["steps"])


def test_the_alarms_of_a_real_run_begin_anew_after_a_shadow_run() -> None:
    assert run_ranks(real_after_shadow, 2) == [45, 45]


def saved_early(rank: int, num_steps: int) -> list[str]:
    model, optimizer, compression = compressed(2.0)
    steps(rank, model, optimizer, 0, num_steps)
    saved = compression.state_dict()
    _, _, fresh = compressed(2.0)
    return warnings_of(lambda: fresh.load_state_dict(saved))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_state_from_before_the_buckets_settled_says_so(num_steps: int) -> None:
    for messages in run_ranks(saved_early, 2, num_steps):
        assert any("before DDP had rebuilt its buckets" in message for message in messages) == (
            num_steps == 1
        )


def resized(rank: int, state: dict[str, Any]) -> tuple[int, list[str]]:
    model, optimizer, compression = compressed(2.0)
    steps(rank, model, optimizer, 0, 2)
    messages = warnings_of(lambda: compression.load_state_dict(state))
    return compression.stats()["wire_bytes"], messages


def test_at_another_world_size_the_counters_start_again_and_say_so() -> None:
    state = run_ranks(saved_state, 2, 2.0)[0]
    for wire_bytes, messages in run_ranks(resized, 3, state):
        assert wire_bytes == 0
        assert messages == [
            "compression state of 2 ranks, restored on 3: the byte counters start again from zero"
        ]
