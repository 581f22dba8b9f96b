"""Networks fitted in closed form, by ridge regression alone: scikit-learn estimators, needing the extra `data`.

    SampledFeatures…     random or SWIM features and one ridge regression; `partial_fit`, one Gram matrix in all
    BoostedFeatures…     a residual network grown layer by layer (after RFRBoost), with block-coordinate sweeps
    ForwardProjection…   layers fitted to random projections of inputs and labels

each as …Classifier and …Regressor, with `agop_rounds` that learn a metric of the inputs, and `to_torch()`: the same
network as a module, to run or to train on. `fit_sharded` fits on rows that lie on several ranks, as on all of them in
one place. Everything is computed in float64.

Raises PackageMissing, on import, where scikit-learn is missing.
"""

from efficient_dl.errors import PackageMissing

try:
    import sklearn as _sklearn
except ImportError:
    raise PackageMissing(
        "the closed-form estimators need scikit-learn, which is not installed",
        fix="pip install 'efficient_dl[data]'",
    ) from None

from efficient_dl.closed_form.estimators import (
    BoostedFeaturesClassifier,
    BoostedFeaturesRegressor,
    ForwardProjectionClassifier,
    ForwardProjectionRegressor,
    SampledFeaturesClassifier,
    SampledFeaturesRegressor,
    fit_sharded,
)
from efficient_dl.closed_form.network import ClosedFormNetwork

del _sklearn

__all__ = [
    "BoostedFeaturesClassifier",
    "BoostedFeaturesRegressor",
    "ClosedFormNetwork",
    "ForwardProjectionClassifier",
    "ForwardProjectionRegressor",
    "SampledFeaturesClassifier",
    "SampledFeaturesRegressor",
    "fit_sharded",
]
