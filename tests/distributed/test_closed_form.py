"""Closed-form fits of rows that lie on several ranks: the same weights as in one place."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from efficient_dl import closed_form as cf
from efficient_dl.closed_form.base import ClosedForm
from efficient_dl.closed_form.ranks import Sharded
from efficient_dl.comm import LoopbackHub
from efficient_dl.errors import ConfigError, DataError, EdlError, PlanMismatch
from tests.distributed.launch import run_ranks

SIZES = (70, 31, 99)  # rows of the ranks
SMALL = {"width": 20, "num_layers": 2, "new_features": 20, "features": "random", "random_state": 1}
ESTIMATORS: list[ClosedForm] = [
    cf.SampledFeaturesClassifier(width=50, features="random", ridge=1e-3, random_state=1),
    cf.SampledFeaturesRegressor(width=50, features="random", num_layers=2, random_state=1),
    cf.BoostedFeaturesClassifier(**SMALL, sweeps=1),
    cf.BoostedFeaturesRegressor(**SMALL, agop_rounds=1),
    cf.ForwardProjectionRegressor(width=30, random_state=1),
]


def _rows(estimator: ClosedForm) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(0)
    x = 3 + 5 * rng.normal(size=(sum(SIZES), 6))
    y = np.sin(x[:, 0]) * x[:, 1]
    return x, np.array(["a", "b", "c"])[np.digitize(y, [-1, 1])] if "Classifier" in str(estimator) else y


def _weights(estimator: ClosedForm) -> torch.Tensor:
    return torch.cat([one.flatten() for one in estimator.network_.state_dict().values()])


def _fit_rank(
    rank: int, estimator: ClosedForm, sizes: tuple[int, ...], transport: Any = None
) -> torch.Tensor:
    x, y = _rows(estimator)
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    return _weights(cf.fit_sharded(clone(estimator), x[mine], y[mine], transport))


def _in_threads(function: Any, world_size: int, *arguments: Any) -> list[Any]:
    """function(rank, *arguments, transport) on loopback ranks; an exception is its value."""
    hub = LoopbackHub(world_size)
    values: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            values[rank] = function(rank, *arguments, hub.transport(rank))
        except Exception as error:
            values[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return values


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: type(one).__name__)
def test_three_ranks_get_the_weights_of_one(estimator: ClosedForm) -> None:
    everyone = _in_threads(_fit_rank, 3, estimator, SIZES)
    expected = _weights(clone(estimator).fit(*_rows(estimator)))
    for weights in everyone:
        assert isinstance(weights, torch.Tensor), weights
        assert torch.equal(weights, everyone[0])
    torch.testing.assert_close(everyone[0], expected, rtol=1e-10, atol=1e-10)


def _fit_several(rank: int) -> list[torch.Tensor]:
    return [_fit_rank(rank, estimator, (120, 80)) for estimator in ESTIMATORS[:3]]


def test_two_processes_over_gloo_get_the_weights_of_one() -> None:
    first, second = run_ranks(_fit_several, 2)
    for one, other, estimator in zip(first, second, ESTIMATORS, strict=False):
        assert torch.equal(one, other)
        expected = _weights(clone(estimator).fit(*_rows(estimator)))
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{"features": "swim"}, {"features": "fields", "image_shape": (2, 3)}], ids=["swim", "fields"]
)
def test_what_is_drawn_from_rank_0s_rows_is_the_same_everywhere(settings: dict[str, Any]) -> None:
    drawn = cf.SampledFeaturesRegressor(width=20, random_state=1, **settings)
    everyone = _in_threads(_fit_rank, 3, drawn, SIZES)
    assert all(torch.equal(weights, everyone[0]) for weights in everyone)


@pytest.mark.parametrize(("same", "words"), [("targets", "all alike"), ("rows", "rows that differ")])
def test_swim_without_pairs_on_rank_0_stops_all(same: str, words: str) -> None:
    def fit(rank: int, transport: Any) -> Any:
        x, y = _rows(ESTIMATORS[1])
        if rank == 0:
            x, y = (x[:20], np.full(20, 0.5)) if same == "targets" else (np.tile(x[:1], (20, 1)), y[:20])
        swim = cf.SampledFeaturesRegressor(width=20, features="swim", random_state=1)
        return cf.fit_sharded(swim, x, y, transport)

    first, second = _in_threads(fit, 2)
    assert isinstance(first, EdlError) and words in str(first) and "features='random'" in str(first)
    assert isinstance(second, PlanMismatch) and "rank 0 cannot start" in str(second)


def test_without_a_seed_all_ranks_take_rank_0s() -> None:
    everyone = _in_threads(_fit_rank, 2, cf.SampledFeaturesRegressor(width=20), (100, 100))
    assert torch.equal(*everyone)


def test_classes_that_only_some_ranks_have_are_everyones() -> None:
    def fit(rank: int, transport: Any) -> cf.SampledFeaturesClassifier:
        x = np.arange(10.0)[:, None] + 10 * rank
        y = ["long label", "short"][rank : rank + 1] * 10
        drawn = cf.SampledFeaturesClassifier(width=20, features="random", random_state=0)
        return cf.fit_sharded(drawn, x, y, transport)

    for estimator in _in_threads(fit, 2):
        assert estimator.classes_.tolist() == ["long label", "short"]
        assert estimator.predict([[2.0], [18.0]]).tolist() == ["long label", "short"]


def test_a_rank_with_bad_rows_or_other_settings_stops_all() -> None:
    def fit(rank: int, bad: str, transport: Any) -> Any:
        x, y = _rows(ESTIMATORS[1])
        estimator = cf.SampledFeaturesRegressor(width=20 + (rank if bad == "settings" else 0))
        if rank == 1 and bad == "rows":
            x[3, 3] = np.nan
        if rank == 1 and bad == "columns":
            x = x[:, :4]
        return cf.fit_sharded(estimator, x, y, transport)

    assert all(isinstance(one, PlanMismatch) for one in _in_threads(fit, 2, "settings"))
    assert all(isinstance(one, PlanMismatch) for one in _in_threads(fit, 2, "columns"))
    first, second = _in_threads(fit, 2, "rows")
    assert isinstance(first, PlanMismatch) and "rank 1 cannot start" in str(first)
    assert isinstance(second, DataError) and "NaN" in str(second)


def test_a_sum_sends_twice_the_others_parts() -> None:
    class Counting:
        def __init__(self, transport: Any) -> None:
            self.transport, self.rank, self.world_size = transport, transport.rank, transport.world_size
            self.device, self.sent = transport.device, 0

        def exchange(self, outgoing: list[torch.Tensor]) -> Any:
            work = self.transport.exchange(outgoing)
            self.sent += work.sent_bytes
            return work

        def gather(self, packet: torch.Tensor) -> Any:
            work = self.transport.gather(packet)
            self.sent += work.sent_bytes
            return work

    def total(rank: int, transport: Any) -> tuple[list[torch.Tensor], int]:
        counting = Counting(transport)
        ones = [torch.full((3, 5), rank + 0.5).double(), torch.tensor(float(rank)).double()]
        return Sharded(counting).sum(ones), counting.sent  # type: ignore[arg-type]

    for (matrix, number), sent in _in_threads(total, 2):
        assert torch.equal(matrix, torch.full((3, 5), 2.0).double()) and float(number) == 1.0
        assert sent == 16 * 8 + 2 * 8  # 8 numbers there, 8 back, and two sizes


def test_other_estimators_and_missing_process_groups_are_errors() -> None:
    x, y = _rows(ESTIMATORS[1])
    with pytest.raises(ConfigError, match="no process group"):
        cf.fit_sharded(cf.SampledFeaturesRegressor(), x, y)
    with pytest.raises(ConfigError, match="Ridge"):
        from sklearn.linear_model import Ridge

        cf.fit_sharded(Ridge(), x, y)  # type: ignore[type-var]
