"""Training with DeepSpeed's engine, ZeRO stages 0, 1 and 2: the same bits where they must be, the same options."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from efficient_dl.errors import CheckpointError, ConfigError, PlanMismatch, TransportError
from efficient_dl.integrations.deepspeed import is_engine
from efficient_dl.integrations.deepspeed_plugs import (
    ENGINE_METHODS,
    ZERO_METHODS,
    check_signatures,
    check_version,
)
from tests.distributed.deepspeed_ranks import CASES, FEW, STEPS, WITH_IDENTITY, more_ranks, two_ranks
from tests.distributed.deepspeed_rules import DEEPSPEED_RULES, STAGES, with_rules
from tests.distributed.launch import run_failing_ranks, run_ranks

if importlib.util.find_spec("deepspeed") is None:
    if os.environ.get("REQUIRE_DEEPSPEED") == "1":
        pytest.fail("REQUIRE_DEEPSPEED=1, but deepspeed is not installed", pytrace=False)
    pytest.skip("this environment lacks deepspeed: pip install -e '.[deepspeed]'", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder: Any) -> list[dict[str, Any]]:
    return run_ranks(with_rules, 2, two_ranks, folder, timeout=280.0)


@pytest.fixture(scope="module")
def three(two: Any, folder: Any) -> list[dict[str, Any]]:
    """Of ranks 0 and 1: rank 2 dies at the end."""
    outcomes = run_failing_ranks(with_rules, 3, more_ranks, folder, True, timeout=280.0)
    assert outcomes[2].exit_code == 7
    assert [o.trace for o in outcomes[:2]] == ["", ""]
    return [outcome.value for outcome in outcomes[:2]]


@pytest.fixture(scope="module")
def four(two: Any, folder: Any) -> list[dict[str, Any]]:
    return run_ranks(with_rules, 4, more_ranks, folder, False, timeout=280.0)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_bits_of_deepspeed(two: Any, name: str) -> None:
    first, second = two[0][name], two[1][name]
    assert first["lossless"]["digest"] == first[None]["digest"]
    assert ("identity" in first) == (name in WITH_IDENTITY)
    assert first.get("identity", first["lossless"])["digest"] == first[None]["digest"]
    assert first[2.0]["digest"] != first[None]["digest"]
    assert [run["digest"] for run in first.values()] == [run["digest"] for run in second.values()]


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_counted_by_parameter(two: Any, name: str) -> None:
    lossless, lossy = (two[0][name][bits]["total"] for bits in ("lossless", 2.0))
    trained = {n for n in lossy["parameters"] if not n.startswith("frozen")}
    assert (
        trained
        == {n for n, row in lossy["parameters"].items() if row["values_sent"]}
        == {
            "first.weight",
            "first.bias",
            "norm.weight",
            "norm.bias",
            "last.weight",
            "last.bias",
            "gain",
        }
    )
    assert 1.0 < lossless["ratio"] < lossy["ratio"]
    assert "identity" not in two[0][name] or two[0][name]["identity"]["total"]["ratio"] == 1.0
    assert lossy["steps"] == lossy["checks"] == STEPS
    assert 2.0 < lossy["bits_per_value"] < 2.6
    assert lossy["relative_error"] > 0 == lossless["relative_error"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks_end_equal_and_lossless(request: Any, world_size: int, name: str) -> None:
    """Sums of three and more have DeepSpeed's values, but gloo adds in another order: no bits to compare."""
    results = [rank[name] for rank in request.getfixturevalue({3: "three", 4: "four"}[world_size])]
    for other in results[1:]:
        assert [run["digest"] for run in other.values()] == [run["digest"] for run in results[0].values()]
    assert results[0]["lossless"]["digest"] == results[0]["identity"]["digest"]
    # Adam's step of 0.005 can turn where a gradient is as small as its rounding; bf16 has 8 bits.
    assert results[0]["identity"]["distance"] < 0.02
    assert results[0]["identity"]["losses"] == pytest.approx(results[0][None]["losses"], rel=2e-3)


@pytest.mark.parametrize("rule", DEEPSPEED_RULES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_rule_holds(request: Any, world_size: int, stage: int, rule: str) -> None:
    """The rules that hold everywhere; test_rules.py has them for the other integrations."""
    ranks = request.getfixturevalue({2: "two", 3: "three", 4: "four"}[world_size])
    for rank, found in enumerate(ranks):
        failure = found["rules"][stage][rule]
        assert not failure, f"on rank {rank}: {failure}"


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_goes_on_with_the_plan_that_auto_chose_before_it_was_saved(two: Any, stage: int) -> None:
    for rank, found in enumerate(two):
        seen = found["saved plan"][stage]
        assert (seen["planned"], seen["planned again"]) == ("2.0", "none")
        assert seen["plugged"] == ("2.0", "grid:2.0")
        assert seen["parted"] == seen["whole"]
        said = "the run goes on with 2.0, the plan it was saved with; this start alone would have chosen none"
        assert any(said in message for message in seen["messages"]) == (rank == 0)
        for refused in ("fixed", "floor"):
            assert isinstance(seen[refused], PlanMismatch)
            assert "codec = grid:2.0 (checkpoint)" in str(seen[refused])


def test_gradients_travel_once_where_one_rank_reads_them(two: Any) -> None:
    once, twice = (
        two[0][name]["identity"]["total"]["values_sent"] for name in ("stage 2", "stage 2, all-reduced")
    )
    assert once * 2 == twice


def test_two_bits_train(two: Any) -> None:
    native, lossy = two[0]["long"][None], two[0]["long"][2.0]
    assert sum(lossy[-5:]) < 0.9 * sum(lossy[:5])
    assert sum(lossy[-5:]) == pytest.approx(sum(native[-5:]), rel=0.05)


def test_none_is_deepspeed_untouched(two: Any) -> None:
    result = two[0]["none"]
    assert result["digest"] == two[0]["stage 2"][None]["digest"]
    assert result["stats"]["bytes_source"] == "analytic"
    trained = 48 * 300 + 3 * 300 + 100 * 170 + 170 + 1
    assert result["stats"]["wire_bytes"] == STEPS * 4 * trained


def test_auto_measures_and_every_rank_comes_to_the_same(two: Any) -> None:
    assert two[0]["auto"] == two[1]["auto"]
    for bits, reason, steps in two[0]["auto"].values():
        assert bits in ("none", "lossless", "4.0", "3.0")
        assert "a step of" in reason and "the floor is 3 bits" in reason
        assert steps == STEPS


def test_the_configuration_s_section_is_as_good_as_arguments(two: Any) -> None:
    section = two[0]["section"]
    assert (section["bits"], section["checks"]) == ("lossless", STEPS)
    assert section["digest"] == two[0]["stage 2"]["lossless"]["digest"]


@pytest.mark.parametrize("name", ["unknown", "no object", "no number", "no rate", "twice"])
def test_a_wrong_section_is_refused(two: Any, name: str) -> None:
    parts = {
        "unknown": ("unknown key 'bitz'", "did you mean 'bits'?"),
        "no object": ("is no object", '{"bits": 2.0}'),
        "no number": ("check_every has a wrong value", "'often'"),
        "no rate": ("bits has a wrong value", "True"),
        "twice": ("bits is given twice", "2.0", "3.0"),
    }[name]
    for rank in two:
        error = rank["section"][name]
        assert isinstance(error, ConfigError)
        assert all(part in str(error) for part in (*parts, "efficient_dl"))


def test_what_cannot_be_compressed_is_refused(two: Any) -> None:
    for rank in two:
        refused = rank["refused"]
        assert isinstance(refused["stage 3"], ConfigError)
        assert "FSDP2" in str(refused["stage 3"])
        assert "compressed already" in str(refused["twice"])
        assert "a DeepSpeedEngine" in str(refused["no engine"])
        assert "its own optimizer, and this is another one" in str(refused["other optimizer"])
        assert isinstance(refused["plans differ"], PlanMismatch)
        assert "plan.bits = 3.0 (rank 1), 2.0 (rank 0)" in str(refused["plans differ"])


def test_close_gives_the_engine_back(two: Any) -> None:
    closed = two[0]["closed"]
    assert closed["replaced"] == ({"step", "save_checkpoint", "load_checkpoint"}, set(ZERO_METHODS))
    assert closed["restored"]
    assert closed["digest"] == two[0]["stage 2"][None]["digest"]


def test_an_overflow_skips_the_step_on_all_ranks(two: Any) -> None:
    for rank in two:
        for result in rank["overflow"].values():
            assert (result["skipped"], result["unchanged"], result["halved"]) == (1, True, 0.5)
            assert result["digest"] != result["trained"]
        assert rank["overflow"]["lossless"] == rank["overflow"][None] == two[0]["overflow"][None]
        assert rank["overflow"][2.0] == two[0]["overflow"][2.0]


@pytest.mark.parametrize("name", ["stage 0", "stage 2, fp16"])
def test_a_resumed_run_equals_one_that_never_stopped(two: Any, name: str) -> None:
    for rank in two:
        assert rank["resume"][name]["same state"]
        assert rank["resume"][name]["parted"] == rank["resume"][name]["whole"]


def test_incomplete_states_are_refused_and_absent_ones_logged(two: Any) -> None:
    for rank in two:
        lacking = rank["lacking"]
        assert isinstance(lacking["other plan"], PlanMismatch)
        error, messages, steps = lacking["module only"]
        assert (error, steps) == (None, 0) and "optimizer's states are not loaded" in messages[0]
        error, _, _ = lacking["one gone"]
        assert isinstance(error, CheckpointError) and "none for rank 1" in str(error)
        error, messages, steps = lacking["all gone"]
        assert (error, steps) == (None, 0) and "was saved without" in messages[0]


def test_another_number_of_ranks_starts_the_state_anew(three: Any) -> None:
    messages, steps = three[0]["other world size"]
    assert steps == 0 and "saved by 2 ranks, loaded by 3" in messages[0]


def test_a_dead_rank_ends_the_others_in_time(three: Any) -> None:
    for rank in three:
        error, seconds = rank["dead"]
        assert isinstance(error, TransportError)
        assert seconds < 100.0  # less than any time-out


def test_another_deepspeed_is_refused() -> None:
    check_version("0.19.8+git")
    for version in ("0.19.7", "0.20.0", "1.0.0"):
        with pytest.raises(ConfigError, match=r"deepspeed>=0\.19\.8,<0\.20"):
            check_version(version)


def test_the_installed_deepspeed_has_the_methods_that_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    check_signatures(DeepSpeedEngine, ENGINE_METHODS, "0.19.8")
    check_signatures(DeepSpeedZeroOptimizer, ZERO_METHODS, "0.19.8")

    class Changed(DeepSpeedZeroOptimizer):
        def allreduce_bucket(self, bucket: Any, dtype: Any) -> None: ...

    with pytest.raises(ConfigError, match=r"(?s)communication_data_type, rank.*\(self, bucket, dtype\)"):
        check_signatures(Changed, ZERO_METHODS, "0.19.8")
    assert not is_engine(object())
