"""What the estimators share: checks, scales, AGOP rounds, predictions, and the network as a torch module."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from efficient_dl.closed_form.fits import agreed, by_rows
from efficient_dl.closed_form.gram import Strength
from efficient_dl.closed_form.network import ClosedFormNetwork, Scale, linear, make_activation
from efficient_dl.closed_form.prepare import Array, Prepared, all_classes, one_hot, prepare
from efficient_dl.closed_form.ranks import Alone, Ranks
from efficient_dl.closed_form.refits import metric
from efficient_dl.errors import ConfigError


class ClosedForm(BaseEstimator):
    """An estimator that is a network after `fit`: `network_`, a ClosedFormNetwork in float64."""

    width: int
    num_layers: int
    activation: str
    ridge: Strength
    agop_rounds: int
    random_state: Any
    network_: ClosedFormNetwork
    n_features_in_: int

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to rows X (rows, features) and y. Raises ValueError for data or settings that cannot be used."""
        return self.fit_on(X, y, Alone())

    def fit_on(self, X: Any, y: Any, ranks: Ranks) -> Self:
        """`fit` on the rows of all ranks, of which these are one's own: every rank ends with the same network."""
        failure: Exception | None = None
        rows, targets = np.empty((0, 0)), np.empty(0)
        try:
            self._check_settings()
            rows, targets = self._checked(X, y, reset=True)
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        except (ValueError, TypeError) as error:
            failure, seed = error, 0
        settings = {name: repr(value) for name, value in sorted(self.get_params().items())}
        settings.pop("random_state", None)  # rank 0's seed is taken
        facts = {"estimator": type(self).__name__, "settings": settings, "features": rows.shape[1]}
        ranks.agree(facts, failure)
        data = prepare(rows, self._encoded(targets, ranks), seed, ranks, scale_targets=self._scales_targets)
        with torch.no_grad():
            self.network_ = self._fitted(data, ranks)
        return self

    def to_torch(self, dtype: torch.dtype = torch.float32) -> ClosedFormNetwork:
        """A copy of the network as a trainable module: a start for SGD, or for use without scikit-learn.

        It takes X as `predict` does and returns (rows, outputs): predictions, or one score a class, in the order of
        classes_. In float64 these are the estimator's own numbers.
        """
        check_is_fitted(self)
        return copy.deepcopy(self.network_).to(dtype).requires_grad_()

    @abstractmethod
    def _build(
        self, data: Prepared, x: Tensor, generator: torch.Generator, ranks: Ranks
    ) -> ClosedFormNetwork:
        """A network from x, which is data.x or its image in another metric, to data.y."""

    @abstractmethod
    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        """Rows in float64 and targets, as scikit-learn wants them checked."""

    @abstractmethod
    def _encoded(self, targets: Array, ranks: Ranks) -> Array:
        """Targets as float64 (rows, outputs)."""

    @property
    @abstractmethod
    def _scales_targets(self) -> bool: ...

    def _check_settings(self) -> None:
        make_activation(self.activation)
        at_least({"width": self.width, "num_layers": self.num_layers}, 1)
        at_least({"agop_rounds": self.agop_rounds}, 0)
        check_strength("ridge", self.ridge)

    def _fitted(self, data: Prepared, ranks: Ranks) -> ClosedFormNetwork:
        generator = torch.Generator()
        network, transform = self._build(data, data.x, generator.manual_seed(data.seed), ranks), None
        for _ in range(self.agop_rounds):
            transform = metric(network, transform, data.x, ranks)
            network = self._build(data, data.x @ transform, generator.manual_seed(data.seed), ranks)
        return agreed(finished(network, data, transform), ranks)

    def _scores(self, X: Any) -> Array:
        check_is_fitted(self)
        rows: Any = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            return by_rows(self.network_, torch.tensor(rows, dtype=torch.float64)).numpy()


class Classifier(ClassifierMixin, ClosedForm):
    """Regression onto one-hot targets; the class of the largest score is the prediction."""

    classes_: Array

    def decision_function(self, X: Any) -> Array:
        """Scores (rows, classes); for two classes their difference (rows,), positive for classes_[1]."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> Array:
        """The labels with the largest scores: (rows,)."""
        best = self._scores(X).argmax(1)
        return self.classes_[best]

    @property
    def _scales_targets(self) -> bool:
        return False

    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        least = 2 if reset else 1
        checked: Any = validate_data(self, X, y, reset=reset, dtype=np.float64, ensure_min_samples=least)
        rows, labels = checked
        check_classification_targets(labels)
        return rows, labels

    def _encoded(self, targets: Array, ranks: Ranks) -> Array:
        self.classes_ = all_classes(np.unique(targets), ranks)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs two classes; there is 1 class: {self.classes_.tolist()}")
        return one_hot(targets, self.classes_)


class Regressor(RegressorMixin, ClosedForm):
    """One or several continuous targets."""

    def predict(self, X: Any) -> Array:
        """Targets in the shape of those that were fitted: (rows,) or (rows, outputs)."""
        scores = self._scores(X)
        return scores if self._several_ else scores[:, 0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    @property
    def _scales_targets(self) -> bool:
        return True

    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        checked: Any = validate_data(
            self,
            X,
            y,
            reset=reset,
            dtype=np.float64,
            ensure_min_samples=2 if reset else 1,
            multi_output=True,
            y_numeric=True,
        )
        rows, targets = checked
        if reset:
            self._several_ = targets.ndim == 2
        return rows, targets

    def _encoded(self, targets: Array, ranks: Ranks) -> Array:
        columns = targets.astype(np.float64).reshape(len(targets), -1)
        widths = ranks.gather(columns.shape[1])
        if len(set(widths)) > 1:
            raise ValueError(f"ranks have different numbers of targets: {widths}")
        return columns


def finished(network: ClosedFormNetwork, data: Prepared, transform: Tensor | None) -> ClosedFormNetwork:
    """The network with the scales of inputs and targets inside it."""
    steps: list[nn.Module] = [data.inputs]
    if transform is not None:
        steps.append(linear(transform.T.contiguous(), None))
    network.inputs = nn.Sequential(*steps)
    network.head = unscaled(network.head, data.targets)
    return network


def unscaled(head: nn.Linear, targets: Scale) -> nn.Linear:
    """A head that puts out targets in their own units."""
    return linear(head.weight * targets.std[:, None], head.bias * targets.std + targets.mean)


def at_least(settings: dict[str, Any], least: int) -> None:
    """Raises ConfigError unless all are whole numbers from `least` on."""
    for name, value in settings.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"{name} cannot be {value!r}", expected=f"a whole number from {least} on", where=name
            )


def check_strength(name: str, value: Any) -> None:
    """Raises ConfigError unless it is a strength of a ridge."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if value != "gcv" and not (number and 0 < value < float("inf")):
        raise ConfigError(f"{name} cannot be {value!r}", expected="a positive number, or 'gcv'", where=name)
