"""An engine's plan changes by itself, on all ranks after the same optimizer step; nothing is lost meanwhile."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_dl.comm.look import Allowance
from efficient_dl.comm.measurements import Line, Measurements
from efficient_dl.comm.replanning import Hysteresis
from efficient_dl.errors import ConfigError, PlanMismatch
from efficient_dl.integrations import ddp_replanning
from efficient_dl.integrations.deepspeed import compress_engine
from efficient_dl.integrations.deepspeed_plugs import ENGINE_METHODS, ZERO_METHODS
from efficient_dl.integrations.plan_watch import ReplanOptions
from tests.distributed.deepspeed_ranks import (
    BF16,
    CASES,
    CONFIG,
    FAST,
    FP16,
    SLOW,
    digest,
    engine_of,
    error_of,
    run,
    start_deepspeed,
    train,
    warnings_in,
)
from tests.distributed.deepspeed_sums import Sums, row, started
from tests.distributed.launch import run_ranks
from tests.distributed.measured_links import measuring

if importlib.util.find_spec("deepspeed") is None:
    if os.environ.get("REQUIRE_DEEPSPEED") == "1":
        pytest.fail("REQUIRE_DEEPSPEED=1, but deepspeed is not installed", pytrace=False)
    pytest.skip("this environment lacks deepspeed: pip install -e '.[deepspeed]'", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EAGER = ReplanOptions(hysteresis=Hysteresis(distance_steps=0), allowance=Allowance(share=1000.0))
STAGES = (0, 1, 2)
# Whose gradients a look takes a sample of, by our methods in DeepSpeed's place.
SAMPLED = [
    *("stage 0, predivided", "stage 0, accumulated", "stage 0, fp16", "stage 1, bf16 and float32"),
    *("stage 2", "stage 2, all-reduced and predivided", "stage 2, one reduce a rank", "stage 2, accumulated"),
    *("stage 2, sent as bf16", "stage 2, fp16"),
]


def sgd(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero": {"stage": stage}, "sgd": True, **more}


def bits_of(compression: Any) -> list[tuple[int, str]]:
    return [(one["step"], one["bits"]) for one in compression.stats()["plans"]]


def plugged(engine: Any) -> bool:
    return bool(ENGINE_METHODS.keys() & vars(engine) or ZERO_METHODS.keys() & vars(engine.optimizer))


# -------------------------------------------------------------------- by measurements
class Scripted:
    """Looks that find a link of this speed; nothing is measured."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.seen: list[tuple[int, int]] = []

    def __call__(
        self,
        known: Measurements,
        carrier: Any,
        native: Any,
        levels: Any,
        itemsize: int,
        values: Any,
        segments: Any,
        kernel: str,
        *,
        feeds_back: bool,
    ) -> Measurements:
        assert feeds_back  # SGD, with a global step
        self.seen.append((0 if values is None else values.numel(), sum(segments)))
        return replace(known, native=self.line, exchange=self.line)


def looked_at(rank: int, stage: int, links: Measurements, line: Line, folder: Path) -> dict[str, Any]:
    """A run whose link is found to be another one; and what it is from there on without compression."""
    ddp_replanning.look = Scripted(line)
    engine = engine_of(sgd(stage))
    compression = started(engine, links, EAGER, check_every=11)
    messages: list[str] = []
    with warnings_in(messages):
        train(engine, rank, 48)
    stats = compression.stats()
    seen = {"plans": stats["plans"], "looks": ddp_replanning.look.seen, "messages": messages, "stats": stats}
    engine.save_checkpoint(str(folder))
    train(engine, rank, 5)
    seen["plugged"] = plugged(engine)  # but the 55th step is sampled
    train(engine, rank, 6)
    seen["digest"] = digest(engine)
    compression.close()
    engine = engine_of(sgd(stage))
    engine.load_checkpoint(str(folder))
    train(engine, rank, 11)
    return seen | {"native from there on": digest(engine)}


# -------------------------------------------------------------------- native
def sampled(rank: int, name: str) -> dict[str, Any]:
    """DeepSpeed's own reductions, of which every second step is sampled for a look that is never taken."""
    engine = engine_of(CASES[name])
    compression = started(engine, FAST, check_every=2)
    planner, when, kept = compression._replanner, [], []
    forget = planner.forget_sample
    planner.forget_sample = lambda: (kept.append(planner._sample.taken()[0]), forget())
    for _ in range(4):
        when.append(plugged(engine))
        train(engine, rank, 1)
    result = {"digest": digest(engine), "when": when, "stats": compression.stats()}
    compression.close()
    return result | {
        "kept": [int(one.numel()) for one in kept],
        "native": run(CASES[name], None, rank, 4)["digest"],
    }


# -------------------------------------------------------------------- residuals
DRAINED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    **{f"stage {n}, native": ({"zero": {"stage": n}}, [row(4, "none")]) for n in STAGES},
    **{f"stage {n}, lossless": ({"zero": {"stage": n}}, [row(4, "lossless")]) for n in STAGES},
    "stage 2, another rate": ({"zero": {"stage": 2}}, [row(3, "4.0"), row(7, "none")]),
    "stage 2, to and fro": ({"zero": {"stage": 2}}, [row(3, "none"), row(4, "2.0"), row(7, "none")]),
    "stage 2, at once": ({"zero": {"stage": 2}}, [row(4, "none"), row(5, "lossless")]),
    "stage 2, all-reduced": ({"zero": {"stage": 2, "reduce_scatter": False}}, [row(4, "none")]),
    "stage 2, one reduce a rank": (
        {"zero": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
        [row(4, "none")],
    ),
    "stage 2, accumulated": (
        {"zero": {"stage": 2}, "gradient_accumulation_steps": 2},
        [row(4, "lossless"), row(5, "2.0"), row(7, "none")],
    ),
    "stage 0, accumulated": ({"zero": {"stage": 0}, "gradient_accumulation_steps": 2}, [row(4, "none")]),
}


def drained(rank: int, name: str) -> dict[str, Any]:
    case, plans = DRAINED[name]
    sums = Sums(rank, case, plans)
    distances = [sums.step() for _ in range(10)]
    stats = sums.compression.stats(all_ranks=True)
    result = {
        "largest": max(distances[:4]),
        "last": distances[-1],
        "norms": {name: one["residual_norm"] for name, one in stats["parameters"].items()},
        "plans": bits_of(sums.compression),
    }
    sums.compression.close()
    return result


def skipped(rank: int, stage: int) -> dict[str, Any]:
    """The first step after the switch overflows on rank 0: what it drained comes with the next one."""
    # Without ZeRO, DeepSpeed 0.19.8 divides by a loss scale that it has not multiplied with: 1 there.
    half = {**FP16, "initial_scale_power": 8 if stage else 0, "loss_scale_window": 1000}
    sums = Sums(rank, {"zero": {"stage": stage}, "fp16": half}, [row(4, "none")], check_every=4)
    before = [sums.step() for _ in range(4)][-1]
    scale = sums.engine.optimizer.loss_scale
    result = {
        "before": before,
        "skipped": sums.step(poisoned=True),
        "after": [sums.step() for _ in range(3)][-1],
    }
    result |= {"scales": [scale, sums.engine.optimizer.loss_scale], "skips": sums.engine.skipped_steps}
    sums.compression.close()
    return result


def accumulated(rank: int) -> dict[str, Any]:
    """A comparison that a user asks for between two passes of one optimizer step."""
    case = {"zero": {"stage": 2}, "gradient_accumulation_steps": 2}
    sums = Sums(rank, case, [row(3, "none"), row(4, "none")], check_every=100)
    compression, seen = sums.compression, list[Any]()

    def between() -> None:
        compression.check()
        seen.append(compression.plan.bits)

    for _ in range(3):
        sums.step()
    sums.step(between=between)
    compression.check()
    seen += [bits_of(compression), [sums.step() for _ in range(3)][-1]]
    compression.close()
    return {"seen": seen}


class Late(nn.Module):
    """`late` has a gradient in the second of two passes alone; its slices, on both ranks, are summed up one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Parameter(torch.zeros(3000))
        self.weight = nn.Parameter(torch.zeros(2000))

    def forward(self, x: Tensor, is_second: bool) -> Tensor:
        loss = (self.weight * x[3000:]).sum()
        return loss + (self.late * x[:3000]).sum() if is_second else loss


def parted(rank: int) -> list[float]:
    """How far weights are from what they should be, before and after a switch."""
    import deepspeed

    net = Late()
    zero = {"stage": 2, "reduce_bucket_size": 16000, "use_multi_rank_bucket_allreduce": False}
    more = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
    config = {**CONFIG, **more, "zero_optimization": zero}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine: Any = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    compression = started(engine, SLOW)
    compression.replay([row(4, "none")], 100)
    inputs = [torch.randn(5000, generator=torch.Generator().manual_seed(one)) for one in range(2)]
    mean, distances = torch.stack(inputs).mean(0), []
    mean[:3000] /= 2
    for steps in range(1, 7):
        for is_second in (False, True):
            engine.backward(engine(inputs[rank], is_second))
            engine.step()
        whole = torch.cat([p.detach() for p in net.parameters()])
        distances.append(float((whole + steps * mean).norm() / mean.norm()))
    compression.close()
    return [distances[3], distances[-1]]


# -------------------------------------------------------------------- resumes
PLANS = [row(10, "4.0"), row(15, "none"), row(25, "2.0"), row(30, "lossless"), row(35, "none")]


def resumed(rank: int, case: dict[str, Any], links: Measurements, folder: Path) -> dict[str, Any]:
    """From some steps on: whether weights, plans and counts are those of the run that went on."""

    def made(found: Measurements, after: int) -> tuple[Any, Any]:
        engine = engine_of(case)
        compression = started(engine, found, check_every=5)
        if after:
            engine.load_checkpoint(str(folder), tag=f"global_step{after}")
        compression.replay([one for one in PLANS if one["step"] > after], 40)
        return engine, compression

    def end(engine: Any, compression: Any) -> list[Any]:
        stats = compression.stats()
        keys = ("wire_bytes", "raw_bytes", "native_bytes", "steps", "checks", "bytes_source", "parameters")
        found = [digest(engine), bits_of(compression), *(stats[key] for key in keys)]
        compression.close()
        return found

    engine, compression = made(links, 0)
    for _ in range(8):
        train(engine, rank, 5)
        engine.save_checkpoint(str(folder))
    whole, seen = end(engine, compression), {}
    messages: list[str] = []
    with warnings_in(messages):
        for after in (5, 15, 30) if case["zero"]["stage"] != 1 and "fp16" not in case else (15, 30):
            engine, compression = made(FAST if links is SLOW else SLOW, after)  # it would be another plan
            train(engine, rank, 40 - after)
            seen[after] = end(engine, compression) == whole
    return {"seen": seen, "plans": whole[1], "messages": messages}


def elsewhere(rank: int, folder: Path) -> dict[str, Any]:
    """What becomes of the states of `resumed` in other runs, and of states that know less."""
    seen: dict[str, Any] = {}
    engine = engine_of(sgd(2))
    compression = started(engine, SLOW, error_feedback=False)
    seen["dropped"] = error_of(lambda: engine.load_checkpoint(str(folder), tag="global_step15"))
    compression.close()
    compression = started(engine, SLOW)
    engine.load_checkpoint(str(folder), tag="global_step25")
    state = compression.state_dict()["replanner"]
    seen["allowance"] = state["allowance"], state["looks"]
    compression.close()
    path = folder / "global_step10" / f"efficient_dl_rank{rank}.pt"
    state = torch.load(path, weights_only=True)
    for name, changed in {"old": {}, "other ranks": {"world_size": 3}}.items():
        torch.save({key: value for key, value in (state | changed).items() if key != "replanner"}, path)
        engine = engine_of(sgd(2))
        compression = started(engine, FAST)
        engine.load_checkpoint(str(folder), tag="global_step10")
        train(engine, rank, 1)
        seen[name] = bits_of(compression), compression.stats()["steps"]
        compression.close()
    engine = engine_of(sgd(2))
    compression = started(engine, SLOW)
    train(engine, rank, 2)
    engine.load_checkpoint(str(folder), tag="global_step10")  # other ranks' still
    stats = compression.stats()
    norms = {one["residual_norm"] for one in stats["parameters"].values()}
    seen["trained before"] = bits_of(compression), stats["steps"], stats["wire_bytes"], norms
    compression.close()
    return seen


# -------------------------------------------------------------------- options
def ended(rank: int) -> dict[str, Any]:
    """The kill switch, pulled while a residual waits for a gradient, and before another plan would come."""
    sums = Sums(rank, {"zero": {"stage": 2}}, [row(2, "none"), row(5, "2.0")])
    for _ in range(2):
        sums.step()
    if rank == 1:
        sums.compression.disable("a test")
    seen, plans = [plugged(sums.engine)], sums.compression.plans
    for _ in range(4):
        sums.step()
        seen.append(plugged(sums.engine) or sums.compression.plans != plans)
    stats = sums.compression.stats()
    sums.compression.close()
    return {"seen": seen, "off": stats["disabled"], "kept": stats["parameters"]["rare"]["residual_norm"]}


def optioned(rank: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    engine = engine_of(sgd(0), {"replan": "often"})
    result["wrong"] = error_of(lambda: compress_engine(engine))
    engine = engine_of(sgd(0))
    result["impossible"] = error_of(lambda: compress_engine(engine, replan=EAGER, check_every=0))
    ddp_replanning.look = Scripted(Line(1e-4, 1e11))
    for name, section in {"off": {"replan": False, "check_every": 10}, "never": {"check_every": 0}}.items():
        engine = engine_of(sgd(0), section)
        messages: list[str] = []
        with warnings_in(messages), measuring(SLOW):
            compression = compress_engine(engine)
            train(engine, rank, 40)
        result[name] = bits_of(compression), ddp_replanning.look.seen, messages
        result[f"{name}, replayed"] = error_of(lambda made=compression: made.replay([row(50, "none")], 50))
        compression.close()
    return result


# -------------------------------------------------------------------- what is asked for
TO_NATIVE, TO_BITS = Line(1e-4, 1e11), Line(1e-4, 1e4)


def everything(rank: int, folder: Path) -> dict[str, Any]:
    start_deepspeed(rank)
    return {
        "to native": {n: looked_at(rank, n, SLOW, TO_NATIVE, folder / f"to native {n}") for n in STAGES},
        "to bits": {n: looked_at(rank, n, FAST, TO_BITS, folder / f"to bits {n}") for n in STAGES},
        "sampled": {name: sampled(rank, name) for name in SAMPLED},
        "drained": {name: drained(rank, name) for name in DRAINED},
        "skipped": {n: skipped(rank, n) for n in STAGES},
        "accumulated": accumulated(rank),
        "parted": parted(rank),
        "resumed": {name: resumed(rank, *of, folder / name) for name, of in RESUMED.items()},
        "elsewhere": elsewhere(rank, folder / "stage 2"),
        "ended": ended(rank),
        "optioned": optioned(rank),
    }


RESUMED: dict[str, tuple[dict[str, Any], Measurements]] = {
    "stage 0": (sgd(0), SLOW),
    "stage 1, from native": (sgd(1, bf16=BF16), FAST),
    "stage 2": (sgd(2), SLOW),
    "stage 2, fp16": (sgd(2, fp16=FP16), SLOW),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, tmp_path_factory.mktemp("checkpoints"), timeout=280.0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_link_that_became_fast_takes_all_ranks_to_deepspeed_s_own_reduction(two: Any, stage: int) -> None:
    first, other = (rank["to native"][stage] for rank in two)
    assert first["plans"] == other["plans"] and first["digest"] == other["digest"]
    assert [one["bits"] for one in first["plans"]] == ["2.0", "none"]
    change = first["plans"][1]
    assert change["step"] == 44
    assert change["reason"].startswith("switched from 2.0 bits: native: a step of")
    assert first["stats"]["looks"] == len(first["looks"]) >= 2 and first["looks"][0][0] > 10_000
    assert all(numel == of_parameters for numel, of_parameters in first["looks"])
    for rank, one in enumerate((first, other)):
        told = "bits auto, from step 45 on: switched from"
        assert sum(told in message for message in one["messages"]) == (rank == 0)
        assert not one["plugged"] and one["digest"] == one["native from there on"]
        assert one["stats"]["reason"] == change["reason"]
    stats = first["stats"]
    assert (stats["bits"], stats["bytes_source"], stats["steps"]) == ("none", "counted", 48)
    assert 0 < stats["native_bytes"] < stats["wire_bytes"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_link_that_became_slow_takes_an_engine_that_began_natively_to_two_bits(
    two: Any, stage: int
) -> None:
    first, other = (rank["to bits"][stage] for rank in two)
    assert first["plans"] == other["plans"] and first["digest"] == other["digest"]
    assert [one["bits"] for one in first["plans"]] == ["none", "2.0"]
    assert first["plugged"] and first["digest"] != first["native from there on"]
    assert first["looks"][0][0] > 10_000
    stats = first["stats"]
    assert (stats["bits"], stats["error_feedback"], stats["bytes_source"]) == ("2.0", True, "counted")
    assert 0 < stats["native_bytes"] < stats["wire_bytes"]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_step_that_is_sampled_has_deepspeed_s_bits(two: Any, name: str) -> None:
    for rank in two:
        found = rank["sampled"][name]
        assert found["digest"] == found["native"]
        assert found["when"] == [False, True, False, True]
        assert len(found["kept"]) == 2 and min(found["kept"]) > 10_000
        stats = found["stats"]
        assert (stats["bits"], stats["bytes_source"], stats["checks"]) == ("none", "analytic", 0)


@pytest.mark.parametrize("name", DRAINED)
def test_after_a_switch_no_part_of_any_gradient_is_missing(two: Any, name: str) -> None:
    """While 2 bits are sent, something is; each parameter's next gradient after the switch brings its part."""
    plans = [(one["step"], one["bits"]) for one in DRAINED[name][1]]
    for rank in two:
        found = rank["drained"][name]
        assert found["largest"] > 0.01 and found["last"] < 1e-5
        assert found["norms"] == {"weight": 0.0, "rare": 0.0}
        assert found["plans"] == [(0, "2.0"), *plans]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_deepspeed_skips_drains_nothing(two: Any, stage: int) -> None:
    for rank in two:
        found = rank["skipped"][stage]
        assert found["skips"] == 1 and found["scales"] == ([256.0, 128.0] if stage else [1.0, 1.0])
        assert found["before"] == found["skipped"] > 0.05
        assert found["after"] < 5e-3  # float16


def test_nothing_is_decided_between_the_passes_of_one_optimizer_step(two: Any) -> None:
    for rank in two:
        bits, plans, distance = rank["accumulated"]["seen"]
        assert bits == "2.0" and plans == [(0, "2.0"), (4, "none")] and distance < 1e-5


def test_no_slice_is_lost_of_a_parameter_that_only_the_second_pass_has_a_gradient_of(two: Any) -> None:
    for rank in two:
        before, after = rank["parted"]
        assert before > 0.01 and after < 1e-5


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_before_or_after_any_switch_is_one_that_never_stopped(two: Any, name: str) -> None:
    for rank, found in enumerate(two):
        resumed_from = found["resumed"][name]
        assert all(resumed_from["seen"].values()), resumed_from["seen"]
        began = (0, "2.0" if RESUMED[name][1] is SLOW else "none")
        assert resumed_from["plans"] == [began, *((one["step"], one["bits"]) for one in PLANS)]
        said = [one for one in resumed_from["messages"] if "the plan it was saved with" in one]
        assert bool(said) == (rank == 0)


def test_states_of_other_runs_are_refused_or_begun_anew(two: Any) -> None:
    for rank in two:
        found = rank["elsewhere"]
        assert isinstance(found["dropped"], PlanMismatch) and "would drop it" in str(found["dropped"])
        assert found["allowance"][0]["looks"] == 0.0 and found["allowance"][1] == 0
        assert found["old"] == ([(10, "4.0")], 11)
        assert found["other ranks"] == ([(10, "none")], 1)
        assert found["trained before"] == ([(10, "2.0")], 0, 0, {0.0})


def test_the_kill_switch_wins_over_waiting_residuals_and_later_plans(two: Any) -> None:
    for rank in two:
        assert rank["ended"]["off"] == {"step": 3, "reason": "rank 1: a test"}
        assert rank["ended"]["seen"] == [True, False, False, False, False]
    assert max(rank["ended"]["kept"] for rank in two) > 0


def test_replan_is_an_option_of_the_section_too_and_needs_comparisons(two: Any) -> None:
    for rank, found in enumerate(two):
        options = found["optioned"]
        assert isinstance(options["wrong"], ConfigError)
        for part in ("replan has a wrong value", "true or false", "'often'", "efficient_dl"):
            assert part in str(options["wrong"])
        assert "plans change where parameters are compared" in str(options["impossible"])
        for name in ("off", "never"):
            plans, looks, messages = options[name]
            assert plans == [(0, "2.0")] and looks == []
            once = [one for one in messages if "planned once, for want of check_every" in one]
            assert len(once) == (name == "never" and rank == 0)
            assert isinstance(options[f"{name}, replayed"], ConfigError)
