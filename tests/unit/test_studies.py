"""The studies of the thesis's claims: pairs of seeds, and verdicts that rows alone decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import closed_form, depth
from benchmarks.closed_form_data import SWEEP_ROWS, digits
from benchmarks.depth_completion import CASE, METHODS, complete
from benchmarks.depth_images import BACKPROP, LOCAL, Method, Trial, accuracy, trained
from benchmarks.studies import listed, paired, seeds_of

Rows = list[dict[str, Any]]


def _rows(case: str, metric: str, systems: Mapping[str, float]) -> Rows:
    """Four seeds of each system, scattered about its mean."""
    return [
        {"case": f"{case}, seed {seed}", "system": system, "metric": metric, "value": mean + 0.1 * (seed % 2)}
        for system, mean in systems.items()
        for seed in range(4)
    ]


def test_pairs_are_joined_by_seed_and_a_diverged_run_decides_nothing() -> None:
    found = paired({0: 3.0, 1: 5.0, 2: 4.0}, {2: 3.0, 1: 3.0, 0: 2.0})
    assert (found.num_pairs, found.mean) == (3, pytest.approx(4 / 3))
    assert found.p == pytest.approx(0.0572, abs=1e-3) and not found.above
    assert paired({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0}).above
    diverged = paired({0: math.nan, 1: 9.0}, {0: 1.0, 1: 1.0})
    assert not diverged.above and not diverged.below
    with pytest.raises(ValueError, match="paired"):
        paired({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


def test_names_are_listed_as_in_a_sentence() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b", "c"])] == ["none", "a", "a, b and c"]


def _depth_rows(factors: float) -> Rows:
    accuracies = {BACKPROP: 95.0, LOCAL: 91.0, f"{LOCAL} + factors, n = 2": factors}
    return _rows(CASE, "test_error", {"1 factor": 100.0, "2 factors": 10.0}) + _rows(
        "digits, 100 rows", "test_accuracy", accuracies
    )


@pytest.mark.parametrize(
    ("factors", "words"),
    [(94.0, "holds: "), (91.5, "holds if the task is low-rank"), (90.0, "holds if the task is low-rank")],
)
def test_the_verdict_on_depth_is_decided_by_half_of_the_gap(factors: float, words: str) -> None:
    sentence = depth.verdict(_depth_rows(factors))
    assert "one factor's with 2 factors" in sentence and sentence.startswith(words)


def test_depth_holds_without_conditions_only_if_every_gap_is_closed_by_the_claims_means() -> None:
    more = {BACKPROP: 95.0, LOCAL: 91.0, f"{LOCAL} + factors, n = 2": 91.2, f"{LOCAL} + dropout": 94.5}
    partly = depth.verdict(_depth_rows(94.0) + _rows("digits, 400 rows", "test_accuracy", more))
    assert partly.startswith("holds if the task is low-rank recovery or digits, 100 rows: ")
    renamed = {"2 factors": "2 factors, Adam"}
    others = [{**row, "system": renamed.get(row["system"], row["system"])} for row in _depth_rows(94.0)]
    assert depth.verdict(others).startswith("holds if the task is digits, 100 rows: ")


def test_without_a_gap_depth_has_nothing_to_close() -> None:
    rows = [row for row in _depth_rows(94.0) if row["system"] != BACKPROP]
    rows += _rows("digits, 100 rows", "test_accuracy", {BACKPROP: 91.0})
    assert "cannot be tested" in depth.verdict(rows)


@pytest.mark.parametrize(("sgd", "words"), [(90.0, "holds at equal"), (99.0, "on toys does not hold here")])
def test_the_verdict_on_closed_forms_is_decided_by_pairs(sgd: float, words: str) -> None:
    systems = {closed_form.BEST: 95.0, closed_form.SGD: sgd, closed_form.PATIENT: 99.0}
    rows: Rows = []
    for name in closed_form.TOYS:
        rows += _rows(name, "accuracy", systems) + _rows(name, "cpu_seconds", systems)
    rows += _rows("digits", "accuracy", {closed_form.BEST: 98.6})
    for width, test in ((16, 80.0), (64, 60.0), (256, 91.0)):
        case = f"digits, {SWEEP_ROWS} rows, width {width}"
        rows += _rows(case, "accuracy", {"no ridge": test, "gcv": test, "sgd mlp": 92.0})
        rows += _rows(case, "train_accuracy", {"no ridge": 99.0, "gcv": 99.0, "sgd mlp": 99.0})
    sentence = closed_form.verdict(rows)
    assert words in sentence
    if sgd < 95:
        assert sentence.startswith(
            "holds if SGD has no more than equal CPU seconds, and overfitting is said of"
        )
    assert (
        "98.65 %" in sentence and "from 16 to 64" in sentence and "90 % at width 256, SGD at 16" in sentence
    )


def test_two_factors_recover_a_matrix_that_one_does_not() -> None:
    _, unseen, rank = complete(METHODS["2 factors"], 0, 600)
    _, plain, plain_rank = complete(METHODS["1 factor"], 0, 600)
    assert unseen < 0.5 < 0.9 < plain
    assert rank < 5 < plain_rank


@pytest.mark.parametrize(
    "how", [Method(local=False), Method(factors=2), Method(preconditioner=2, transport=(0.01,))]
)
def test_a_few_steps_learn_digits(how: Method) -> None:
    split = digits(0).first(200)
    trial = Trial(0.05, 1e-4, 0.0, how.transport[0], 0.0)
    assert accuracy(split, "test", *trained(split, how, trial, 0, 60)) > 50


def test_a_row_without_a_number_is_not_a_number() -> None:
    row = {"case": "a, seed 3", "system": "b", "metric": "c", "value": None}
    assert math.isnan(seeds_of([row], "a", "b", "c")[3])
