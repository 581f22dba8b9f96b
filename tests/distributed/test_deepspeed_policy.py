"""DeepSpeed with error feedback, a common step, the shadow, alarms and the kill switch, all on the same two ranks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_dl.errors import ConfigError
from efficient_dl.integrations.deepspeed import compress_engine
from efficient_dl.integrations.deepspeed_plugs import ZERO_METHODS
from tests.distributed.deepspeed_ranks import (
    CASES,
    FP16,
    digest,
    engine_of,
    error_of,
    run,
    start_deepspeed,
    train,
    warnings_in,
)
from tests.distributed.launch import run_ranks

if importlib.util.find_spec("deepspeed") is None:
    if os.environ.get("REQUIRE_DEEPSPEED") == "1":
        pytest.fail("REQUIRE_DEEPSPEED=1, but deepspeed is not installed", pytrace=False)
    pytest.skip("this environment lacks deepspeed: pip install -e '.[deepspeed]'", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FED_BACK = ["stage 0", "stage 1, bf16 and float32", "stage 2", "stage 2, all-reduced", "stage 2, accumulated"]
SHADOWED = ["stage 0", "stage 2", "stage 2, all-reduced", "stage 2, one reduce a rank", "stage 2, bf16"]
STEPS = 6


def fed_back(rank: int, name: str) -> dict[str, Any]:
    engine = engine_of(CASES[name] | {"sgd": True})
    compression = compress_engine(engine, 1.0, check_every=1)
    losses = train(engine, rank, STEPS)
    stats = compression.stats()
    steps = compression.state_dict()["compressor"]["common_step"]["directions"]
    compression.close()
    return {"losses": losses, "stats": stats, "positions": [one["position"] for one in steps]}


def residuals_of(compression: Any) -> dict[str, torch.Tensor]:
    return compression.state_dict()["compressor"]["residuals"]["parameters"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def skipped(rank: int) -> dict[str, Any]:
    """With a hysteresis of two the first overflow leaves the loss scale as it is."""
    engine = engine_of({"zero": {"stage": 2}, "fp16": {**FP16, "hysteresis": 2}, "sgd": True})
    compression = compress_engine(engine, 1.0)
    train(engine, rank, 3)
    before, scale = residuals_of(compression), engine.optimizer.loss_scale
    train(engine, rank, 1, poisoned=3)
    after = residuals_of(compression)
    compression.close()
    return {
        "skipped": engine.skipped_steps,
        "same scale": engine.optimizer.loss_scale == scale,
        "same residuals": same(before, after),
        "norm": sum(float(kept.norm()) for kept in before.values()),
    }


def resumed(rank: int, folder: Path) -> list[Any]:
    case = CASES["stage 2, fp16"] | {"sgd": True}
    ends: list[Any] = []
    for parted in (False, True):
        engine = engine_of(case)
        compression = compress_engine(engine, 1.0)
        train(engine, rank, 3)
        if parted:
            engine.save_checkpoint(str(folder))
            compression.close()
            engine = engine_of(case)
            compression = compress_engine(engine, 1.0)
            engine.load_checkpoint(str(folder))
        train(engine, rank, 3)
        ends.append((digest(engine), residuals_of(compression), compression.stats()["wire_bytes"]))
        compression.close()
    return [ends[0][0] == ends[1][0], same(ends[0][1], ends[1][1]), ends[0][2] == ends[1][2]]


def shadowed(rank: int, name: str) -> dict[str, Any]:
    engine = engine_of(CASES[name])
    compression = compress_engine(engine, 2.0, check_every=1, shadow=True)
    train(engine, rank, 3)
    result = {"digest": digest(engine), "stats": compression.stats()}
    compression.close()
    native, real = run(CASES[name], None, rank), run(CASES[name], 2.0, rank)
    return result | {"native": native["digest"], "real": real["stats"]}


def disabled(rank: int) -> dict[str, Any]:
    engine = engine_of(CASES["stage 2"])
    compression = compress_engine(engine, 2.0, check_every=2)
    train(engine, rank, 2)
    if rank == 1:
        compression.disable("the link is fast")
    train(engine, rank, 1)
    at_3 = compression.stats()["disabled"]
    train(engine, rank, 1)
    plugged = set(ZERO_METHODS) & set(vars(engine.optimizer))
    train(engine, rank, 2)
    compression.check()
    stats = compression.stats()
    state = compression.state_dict()
    compression.close()
    engine = engine_of(CASES["stage 2"])
    compression = compress_engine(engine, 2.0)
    compression.load_state_dict(state)
    again = set(ZERO_METHODS) & set(vars(engine.optimizer))
    compression.close()
    return {"at 3": at_3, "off": stats["disabled"], "plugged": plugged | again, "stats": stats}


def alarmed(rank: int) -> dict[str, Any]:
    engine = engine_of(CASES["stage 2"])
    messages: list[str] = []
    with warnings_in(messages):
        compression = compress_engine(
            engine, 2.0, check_every=20, max_relative_error=0.01, on_alarm="disable"
        )
        train(engine, rank, 20)
    stats = compression.stats()
    compression.close()
    return {"alarms": stats["alarms"], "off": stats["disabled"], "messages": messages}


def policies(rank: int, folder: Path) -> dict[str, Any]:
    start_deepspeed(rank)
    engine = engine_of(CASES["stage 0"])
    return {
        "fed back": {name: fed_back(rank, name) for name in FED_BACK},
        "skipped": skipped(rank),
        "resumed": resumed(rank, folder),
        "shadow": {name: shadowed(rank, name) for name in SHADOWED},
        "disabled": disabled(rank),
        "alarmed": alarmed(rank),
        "no v": error_of(lambda: compress_engine(engine, 2.0, scale="second_moment")),
        "nothing to feed back": error_of(lambda: compress_engine(engine, "none", error_feedback=True)),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(policies, 2, tmp_path_factory.mktemp("checkpoints"), timeout=280.0)


@pytest.mark.parametrize("name", FED_BACK)
def test_sgd_feeds_errors_back_with_one_step_for_all_packets(two: Any, name: str) -> None:
    """Parameters are compared after every step; gradients that travel once have no results on their way back."""
    first, second = (rank["fed back"][name] for rank in two)
    stats = first["stats"]
    assert (stats["scale"], stats["error_feedback"], stats["checks"]) == ("global", True, STEPS)
    assert (stats["transport"], stats["hierarchy"]) == ("process_group", None)
    norms = [rank["fed back"][name]["stats"]["parameters"]["first.weight"]["residual_norm"] for rank in two]
    assert max(norms) > 0
    assert first["positions"] == second["positions"] and first["positions"][0] is not None
    travels_once = name in ("stage 2", "stage 2, accumulated")
    assert (first["positions"][1] is None) == travels_once
    losses = first["losses"]
    assert losses[-1] < losses[0]


def test_a_skipped_step_leaves_the_residuals_even_at_the_same_loss_scale(two: Any) -> None:
    for rank in two:
        found = rank["skipped"]
        assert (found["skipped"], found["same scale"], found["same residuals"]) == (1, True, True)
        assert found["norm"] > 0


def test_residuals_and_the_common_step_are_in_the_checkpoints(two: Any) -> None:
    assert [rank["resumed"] for rank in two] == [[True, True, True]] * 2


@pytest.mark.parametrize("name", SHADOWED)
def test_the_shadow_has_deepspeed_s_bits_and_counts_what_would_be_sent(two: Any, name: str) -> None:
    for rank in two:
        found = rank["shadow"][name]
        assert found["digest"] == found["native"]
        told, sent = found["stats"], found["real"]
        assert (told["bytes_source"], sent["bytes_source"]) == ("shadow", "counted")
        assert told["raw_bytes"] == sent["raw_bytes"]
        assert told["wire_bytes"] == pytest.approx(sent["wire_bytes"], rel=0.02)
        assert told["relative_error"] == pytest.approx(sent["relative_error"], rel=0.1)


def test_one_rank_ends_compression_on_all_after_the_same_step(two: Any) -> None:
    for rank in two:
        found = rank["disabled"]
        assert found["at 3"] is None
        assert (found["off"]["step"], found["off"]["reason"]) == (4, "rank 1: the link is fast")
        assert found["plugged"] == set()
        assert found["stats"]["native_bytes"] > 0 and found["stats"]["checks"] == 4


def test_an_alarm_is_logged_and_ends_compression_if_asked_to(two: Any) -> None:
    for rank in two:
        found = rank["alarmed"]
        assert [alarm["kind"] for alarm in found["alarms"]] == ["error"]
        assert found["off"]["step"] == 20
        assert any("over the limit of 0.01" in message for message in found["messages"])


def test_wishes_that_cannot_be_met_are_refused(two: Any) -> None:
    for rank in two:
        assert isinstance(rank["no v"], ConfigError) and "second_moment" in str(rank["no v"])
        assert isinstance(rank["nothing to feed back"], ConfigError)
