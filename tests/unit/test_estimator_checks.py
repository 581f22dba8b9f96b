"""scikit-learn's own checks of estimators, all of them."""

from __future__ import annotations

from collections.abc import Callable

from sklearn.utils.estimator_checks import parametrize_with_checks

from efficient_dl import closed_form as cf

# Small networks: the checks fit each some forty times. No check is expected to fail.
ESTIMATORS = [
    cf.SampledFeaturesClassifier(width=64),
    cf.SampledFeaturesRegressor(width=64, features="swim"),
    cf.BoostedFeaturesClassifier(width=32, num_layers=2, new_features=32, sweeps=1),
    cf.BoostedFeaturesRegressor(width=32, num_layers=2, new_features=32, agop_rounds=1),
    cf.ForwardProjectionClassifier(width=64),
    cf.ForwardProjectionRegressor(width=64),
]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learns_check(
    estimator: cf.SampledFeaturesClassifier, check: Callable[[object], None]
) -> None:
    check(estimator)
