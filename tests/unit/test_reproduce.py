"""`edl reproduce`: verdicts follow from rows alone, a study that fails loses no other, the README has what rows say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import (
    claims,
    local_learning,
    objectives,
    partitionwise,
    redundancy,
    reproduce,
    weight_exchange,
)
from benchmarks.claims import CLAIMS, Claim, NotHere
from benchmarks.local_systems import SAME
from benchmarks.reproduce_page import markdown
from benchmarks.verdicts import FAILS, HOLDS, HOLDS_IF, IN_PART, form_of, says, split
from efficient_dl import reproduce as command
from efficient_dl.errors import ConfigError

ROOT = Path(__file__).parents[2]


def row(case: str, system: str, metric: str, value: float | None) -> dict[str, Any]:
    return {"bench": "b", "case": case, "system": system, "metric": metric, "value": value, "unit": "",
            "higher_is_better": True}  # fmt: skip


def seeds(case: str, system: str, metric: str, values: list[float]) -> list[dict[str, Any]]:
    return [row(f"{case}, seed {seed}", system, metric, value) for seed, value in enumerate(values)]


# ------------------------------------------------------------ verdicts
def test_a_verdict_has_one_of_three_forms() -> None:
    assert says([], "n") == "holds: n" and form_of("holds: n") == HOLDS
    assert says(["a", "b"], "n") == "holds if a, and b: n" and form_of("holds if a: n") == HOLDS_IF
    assert says(None, "n") == "does not hold here: n" and form_of(says(None, "n")) == FAILS
    assert split("holds if a: n: m") == ("holds if a", "n: m")
    assert split("T6: toys holds; digits does not hold here.")[0] == IN_PART


def steps_rows(expgb: list[float]) -> list[dict[str, Any]]:
    case = "mlp-micro on digits, 64 a batch, 400 steps, sgd 0.9, target 0.95"
    reference = seeds(case, "cross-entropy", "steps_to_target", [100, 110, 90, 100, 105])
    return [*reference, *seeds(case, "expgb", "steps_to_target", expgb)]


def test_objectives_hold_where_every_paired_difference_is_surely_below() -> None:
    assert form_of(objectives.verdict(steps_rows([65, 75, 60, 66, 70]))) == HOLDS
    assert form_of(objectives.verdict(steps_rows([65, 175, 60, 66, 70]))) == FAILS, (
        "the mean alone is no proof"
    )


def exchange_rows(ratio_8: float, end: float, accuracy: float, scatter: float = 0.01) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cell in ("normal initialization, sgd", "uniform initialization, adamw"):
        case = f"mlp, {cell}"
        rows += seeds(case, weight_exchange.EXACT, "accuracy", [0.90, 0.91, 0.92])
        for rule in ("range", "frozen", "rms", "exponent"):
            last = [end, end + 0.01, end] if rule == "range" else [7.2, 7.1, 7.2]
            rows += seeds(case, weight_exchange.EXACT, f"entropy_{rule}_at_0", [7.0, 7.0, 7.0])
            rows += seeds(case, weight_exchange.EXACT, f"entropy_{rule}_at_100", last)
        for system in weight_exchange.FIRST_BITS:
            factor = 2.0 if "5 bits" in system else 1.0
            rows += seeds(case, system, "ratio", [ratio_8 * factor] * 3)
            rows += seeds(case, system, "accuracy", [accuracy - scatter, accuracy, accuracy + scatter])
    return rows


def test_entropy_holds_under_the_rule_that_lets_it_fall_and_the_exchange_that_is_cheap_enough() -> None:
    cheap = weight_exchange.verdict(exchange_rows(9.0, 6.0, 0.91))
    assert split(cheap)[0] == "holds if weights are quantized by the rule range"
    coarse = weight_exchange.verdict(exchange_rows(5.0, 6.0, 0.91))
    assert "differences begin with 5 bits" in split(coarse)[0]
    assert form_of(weight_exchange.verdict(exchange_rows(9.0, 7.5, 0.91))) == FAILS, "entropy rose everywhere"
    assert form_of(weight_exchange.verdict(exchange_rows(9.0, 6.0, 0.80))) == FAILS, "accuracy was lost"
    assert form_of(weight_exchange.verdict(exchange_rows(9.0, 6.0, 0.91, 0.0))) == FAILS, (
        "three seeds leave it open"
    )


def layerwise_rows(local: list[float], share: float, control: float = 0.6) -> list[dict[str, Any]]:
    title = "gpt-nano on stdlib, partitions from 1, heads linear"
    case = f"{title}, 100 steps, adamw tuned, equal tokens"
    shares = dict.fromkeys(local_learning.LOCAL, share) | dict.fromkeys(local_learning.CONTROLS, control)
    rows = [
        row(f"{title}, costs", one, "live_peak_bytes", 100.0 * part)
        for one, part in {"backprop": 1.0, **shares}.items()
    ]
    rows += seeds(case, "backprop", "bits_per_byte", [2.0, 2.1, 1.9])
    trained = [one for one in local_learning.LOCAL if one not in SAME]  # the others are these, bit for bit
    return rows + [one for name in trained for one in seeds(case, name, "bits_per_byte", local)]


def test_layerwise_must_match_in_loss_and_in_memory() -> None:
    same = [2.0, 2.1, 1.9]
    assert form_of(local_learning.verdict(layerwise_rows(same, 0.4))) == HOLDS
    assert form_of(local_learning.verdict(layerwise_rows(same, 0.9))) == FAILS
    assert form_of(local_learning.verdict(layerwise_rows([2.2, 2.3, 2.1], 0.4))) == FAILS
    assert form_of(local_learning.verdict(layerwise_rows([2.0, 2.1, math.nan], 0.4))) == FAILS


def test_layerwise_without_conditions_needs_less_than_backprop_that_checkpoints_or_accumulates() -> None:
    found = local_learning.verdict(layerwise_rows([2.0, 2.1, 1.9], 0.4, control=0.25))
    assert form_of(found) == HOLDS_IF
    assert "does not count" in split(found)[0] and "(the best control: 0.25 x)" in found


def test_layerwise_decides_nothing_by_two_seeds() -> None:
    rows = [one for one in layerwise_rows([2.0, 2.1, 1.9], 0.4) if not one["case"].endswith("seed 2")]
    assert form_of(local_learning.verdict(rows)) == FAILS


def test_layerwise_accuracy_counts_in_points() -> None:
    def images(worse: float) -> str:
        rows = layerwise_rows([0.80 - worse, 0.81 - worse, 0.79 - worse], 0.4)
        for one in rows:
            if one["metric"] == "bits_per_byte":
                one["metric"] = "accuracy"
                if one["system"] == "backprop":
                    one["value"] = 0.80 + 0.01 * [0, 1, -1][int(one["case"][-1])]
        return form_of(local_learning.verdict(rows))

    assert images(0.002) == HOLDS and images(0.004) == FAILS


def test_layerwise_holds_without_conditions_only_for_one_way_everywhere() -> None:
    first = layerwise_rows([2.0, 2.1, 1.9], 0.4)
    second = [{**one, "case": str(one["case"]).replace("gpt-nano", "mlp")} for one in first]

    def only(rows: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
        return [one for one in rows if one["system"] in ("backprop", *local_learning.CONTROLS, way)]

    one, other = "sequential", "simultaneous, window 2"
    assert form_of(local_learning.verdict([*only(first, one), *only(second, one)])) == HOLDS
    assert form_of(local_learning.verdict([*only(first, one), *only(second, other)])) == HOLDS_IF


def partitionwise_rows(
    num_seeds: int, seconds: float, ranks: int = 2, rounds: int = 3
) -> list[dict[str, Any]]:
    """seconds: of a partition-wise step, where a data-parallel one takes 1."""
    case, rows = f"mlp-base on fashion-mnist, 128 a step, {ranks} ranks", []
    for system in partitionwise.SYSTEMS:
        for step, loss in ((10, 1.0), (20, 0.5), (30, 0.4)):
            rows += seeds(case, system, f"val_loss_at_{step}", [loss + 0.01 * n for n in range(num_seeds)])
        took = seconds if system.startswith("partition-wise") else 1.0
        rows += [
            row(f"{case}, 100mbit, round {n}", system, "step_seconds", took * (1 + 0.01 * n))
            for n in range(rounds)
        ]
    return rows


def test_partitionwise_is_faster_to_native_s_loss_and_few_seeds_or_rounds_decide_nothing() -> None:
    assert form_of(partitionwise.verdict(partitionwise_rows(3, 0.5))) == HOLDS
    assert form_of(partitionwise.verdict(partitionwise_rows(3, 0.8))) == FAILS
    for rows in (partitionwise_rows(1, 0.5), partitionwise_rows(3, 0.5, rounds=1)):
        found = partitionwise.verdict(rows)
        assert form_of(found) == FAILS and "not decided" in found


def test_partitionwise_numbers_of_ranks_are_places_of_their_own() -> None:
    found = partitionwise.verdict([*partitionwise_rows(3, 0.5), *partitionwise_rows(3, 3.0, ranks=4)])
    assert split(found)[0].startswith(
        "holds if it is partition-wise, exact on 100mbit links, 2 ranks, mlp-base"
    )


def test_partitionwise_is_compared_with_what_did_not_diverge() -> None:
    """2 bits diverge after a good start: native alone is the measure, and it is faster."""
    rows = partitionwise_rows(3, 1.5)
    for one in rows:
        if one["system"] == "data-parallel, 2 bits" and one["metric"] == "val_loss_at_30":
            one["value"] = None
    found = partitionwise.verdict(rows)
    assert form_of(found) == FAILS and "0.67 x" in found


def test_partitionwise_that_never_gets_there_is_not_fast() -> None:
    rows = partitionwise_rows(3, 0.1)
    for one in rows:
        if one["system"].startswith("partition-wise") and one["metric"].startswith("val_loss_at_"):
            one["value"] += 1.0
    assert form_of(partitionwise.verdict(rows)) == FAILS


def test_partitionwise_says_where_one_host_alone_may_be_as_fast() -> None:
    rows = partitionwise_rows(3, 0.5)
    for one in rows:
        if one["system"] == "backprop on one host" and one["metric"] == "step_seconds":
            one["value"] *= 0.4
    found = partitionwise.verdict(rows)
    assert "holds if backprop on one host, which may be as fast, does not count: " in found
    assert "0.80 x as fast as one host" in found


def redundancy_rows(
    by_loss: float, at_random: float, case: str = "mlp", seconds: float = 0.8, larger: float = 0.0
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lost_by = {"0.7 by loss": larger, "0.5 by loss": by_loss, "0.5 by random": at_random}
    for name, lost in {redundancy.EVERYTHING: 0.0, **lost_by}.items():
        rows += seeds(case, name, "accuracy", [0.9 - lost, 0.911 - lost, 0.92 - lost])
        rows += seeds(case, name, "step_seconds", [1.0 if name == redundancy.EVERYTHING else seconds] * 3)
        for block in range(2):
            rows += seeds(case, name, f"kept_by_block_{block}", [0.5**block] * 3)
            rows += seeds(case, name, f"learned_by_block_{block}", [0.5] * 3)
    return rows


def test_redundancy_says_what_may_be_left_out_and_how() -> None:
    assert form_of(redundancy.verdict(redundancy_rows(0.001, 0.02))) == HOLDS
    assert "at random" in split(redundancy.verdict(redundancy_rows(0.02, 0.001)))[0]
    assert form_of(redundancy.verdict(redundancy_rows(0.02, 0.02, larger=0.02))) == FAILS
    assert "at least 0.7" in split(redundancy.verdict(redundancy_rows(0.02, 0.02)))[0]


def test_redundancy_must_be_harmless_in_every_case_at_every_larger_share_and_cheaper() -> None:
    good = redundancy_rows(0.001, 0.02)
    mixed = [*good, *redundancy_rows(0.02, 0.02, case="cnn", larger=0.02)]
    assert form_of(redundancy.verdict(mixed)) == FAILS
    assert form_of(redundancy.verdict(redundancy_rows(0.001, 0.02, larger=0.02))) == FAILS
    slow = redundancy.verdict(redundancy_rows(0.001, 0.02, seconds=1.1))
    assert split(slow)[0] == "holds if time does not count"


def test_redundancy_decides_nothing_where_one_example_is_more_than_the_margin() -> None:
    rows = redundancy_rows(0.0, 0.0)
    for one in rows:
        if one["metric"] == "accuracy":
            one["value"] = round(180 * one["value"]) / 180 if one["case"] != "mlp, seed 0" else 161 / 180
    verdict = redundancy.verdict(rows)
    assert form_of(verdict) == FAILS and "too few examples" in verdict and "180 held out" in verdict


# ------------------------------------------------------------ the page
def a_claim(module: str) -> Claim:
    return Claim("T1", "A title", "Words & <more>", "none", module, "none.jsonl")


def test_a_study_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(claim: Claim, rows: Path, quick: bool) -> None:
        if claim.key == "T2":
            raise RuntimeError("the study ended with signal SIGKILL")
        rows.write_text(json.dumps(row("c, seed 0", "s", "m", 1.0)) + "\n")

    study = SimpleNamespace(verdict=lambda rows: f"holds: {len(rows)} row")
    monkeypatch.setattr(reproduce, "_run", failing)
    monkeypatch.setattr(Claim, "study", lambda self: study)
    plots = {key: a_claim("m") for key in ("T1", "T3")} | {"T2": Claim("T2", "B", "w", "a", "m", "r")}
    monkeypatch.setattr(reproduce, "CLAIMS", plots)
    outcomes = reproduce.reproduce(["T1", "T2", "T3"], tmp_path, quick=True, from_results=False)
    assert [bool(one.error) for one in outcomes] == [False, True, False]
    page = (tmp_path / "index.html").read_text()
    assert "SIGKILL" in page and page.count("holds") >= 2 and "&lt;more&gt;" in page
    assert page.count("data:image/svg+xml") == 2 and "<script" not in page
    assert (tmp_path / "T1" / "rows.jsonl").exists() and (tmp_path / "T1" / "index.html").exists()


def test_a_study_in_its_own_process_reports_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 1"):
        reproduce._run(Claim("none", "", "", "", "benchmarks.none", "none"), tmp_path / "rows.jsonl", True)


def test_a_study_that_is_not_here_is_named() -> None:
    with pytest.raises(NotHere, match=r"there is no benchmarks\.nowhere"):
        a_claim("benchmarks.nowhere").study()


def test_unknown_claims_and_contrary_flags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="T9"):
        command.run("T9", tmp_path, quick=True, from_results=False)
    with pytest.raises(ConfigError, match="from-results"):
        command.run("all", tmp_path, quick=True, from_results=True)


def test_outside_a_clone_the_command_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        command, "__file__", str(tmp_path / "site-packages" / "efficient_dl" / "reproduce.py")
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="git clone"):
        command.run("all", tmp_path, quick=True, from_results=False)


COMMITTED = [key for key, claim in CLAIMS.items() if (claims.RESULTS / claim.results).exists()]


@pytest.mark.parametrize("key", COMMITTED)
def test_the_readmes_table_says_what_the_committed_rows_say(key: str) -> None:
    claim = CLAIMS[key]
    verdict = claim.study().verdict(claim.committed_rows())
    assert form_of(verdict)
    outcome = reproduce.Outcome(claim, "committed rows", verdict)
    expected = markdown([outcome]).splitlines()[
        -1
    ]  # edl reproduce all --from-results writes them to table.md
    assert expected in (ROOT / "README.md").read_text().splitlines()
