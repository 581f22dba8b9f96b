"""The estimators: which network is fitted, and its settings."""

from __future__ import annotations

from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from sklearn.utils import check_random_state
from torch import Tensor

from efficient_dl.closed_form.base import (
    Classifier,
    ClosedForm,
    Regressor,
    at_least,
    check_strength,
    finished,
    unscaled,
)
from efficient_dl.closed_form.fits import Boosting, boosted, head_of, projected, sampled, solve_head
from efficient_dl.closed_form.gram import Moments, Strength, chunks, ridge
from efficient_dl.closed_form.network import ClosedFormNetwork
from efficient_dl.closed_form.prepare import Array, Prepared, one_hot, prepare
from efficient_dl.closed_form.ranks import Alone, Ranks, Sharded
from efficient_dl.closed_form.refits import sweep
from efficient_dl.closed_form.sampling import Sampler
from efficient_dl.comm import ProcessGroupTransport, Transport
from efficient_dl.errors import ConfigError


class _Drawn(ClosedForm):
    """What draws features."""

    features: str
    image_shape: tuple[int, ...] | None

    def _sampler(self, generator: torch.Generator, ranks: Ranks) -> Sampler:
        return Sampler(self.features, self.activation, generator, ranks, self.image_shape)

    def _check_settings(self) -> None:
        super()._check_settings()
        self._sampler(torch.Generator(), Alone())
        if self.agop_rounds and self.image_shape is not None:
            raise ConfigError(
                "AGOP rounds mix all pixels, so fields of an image would be none",
                found=f"agop_rounds={self.agop_rounds}, features={self.features!r}",
                fix="agop_rounds=0, or other features",
            )


class _Sampled(_Drawn):
    def __init__(
        self,
        width: int = 512,
        num_layers: int = 1,
        features: str = "swim",
        activation: str = "relu",
        ridge: Strength = "gcv",
        agop_rounds: int = 0,
        image_shape: tuple[int, ...] | None = None,
        random_state: Any = None,
    ) -> None:
        self.width = width
        self.num_layers = num_layers
        self.features = features
        self.activation = activation
        self.ridge = ridge
        self.agop_rounds = agop_rounds
        self.image_shape = image_shape
        self.random_state = random_state

    def fit_on(self, X: Any, y: Any, ranks: Ranks) -> Self:
        self.__dict__.pop("_stream_", None)  # a batch after this one begins anew
        return super().fit_on(X, y, ranks)

    def _build(
        self, data: Prepared, x: Tensor, generator: torch.Generator, ranks: Ranks
    ) -> ClosedFormNetwork:
        network = sampled(x, data.y, self._sampler(generator, ranks), self.width, self.num_layers)
        network.head = head_of(solve_head(network, x, data.y, self.ridge, ranks))
        return network

    def _take(self, rows: Array, targets: Array) -> None:
        """One batch of a stream; targets: (rows, outputs). The first one sets scales and features."""
        if "_stream_" not in self.__dict__:
            if self.agop_rounds:
                raise ConfigError(
                    "a stream of batches cannot have AGOP rounds, which look at the data several times",
                    found=f"agop_rounds {self.agop_rounds}",
                    fix="agop_rounds=0, or fit() on all rows",
                )
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            data = prepare(rows, targets, seed, Alone(), scale_targets=self._scales_targets)
            sampler = self._sampler(torch.Generator().manual_seed(seed), Alone())
            network = sampled(data.x, data.y, sampler, self.width, self.num_layers)
            self.network_ = finished(network, data, None)
            self._targets_, self._stream_ = data.targets, None
        x, y = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
        for part in chunks(len(x)):
            hidden = self.network_.hidden(self.network_.inputs(x[part]))
            batch = Moments.of(hidden, self._targets_(y[part]))
            self._stream_ = batch if self._stream_ is None else self._stream_ + batch
        assert self._stream_ is not None
        self.network_.head = unscaled(head_of(ridge(self._stream_.centred(), self.ridge)), self._targets_)


class SampledFeaturesClassifier(Classifier, _Sampled):
    """Ridge regression on features that are drawn, not trained: one Gram matrix in all.

    width, num_layers: of the layers of features. features: "swim", differences of pairs of rows, drawn where targets
    change fast (Bolager et al. 2023); "random", normal weights; or "fields", normal weights on small rectangles of an
    image, of the first layer (later ones: "random"), which need image_shape: (height, width) or (channels, height,
    width) of a row. activation: "relu" or "tanh".
    ridge: λ of mean ‖y − fW‖² + λ‖W‖², or "gcv": generalized cross-validation chooses it, from the training rows alone.
    agop_rounds: how often to learn a metric of the inputs from the network's gradients, and to fit anew.
    """

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Add a batch of rows: after the last one, the weights are those of all rows at once.

        The first batch gives the inputs' scale, and the pairs of "swim"; it must name all `classes` if it does not
        have rows of each. Memory: one Gram matrix.
        """
        self._check_settings()
        first = "_stream_" not in self.__dict__
        rows, labels = self._checked(X, y, reset=first)
        if first:
            self.classes_ = np.unique(labels if classes is None else classes)
            if len(self.classes_) < 2:
                raise ValueError(
                    f"a classifier needs two classes; there is 1 class: {self.classes_.tolist()}"
                )
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(
                f"classes={np.unique(classes).tolist()}, but the first batch had {self.classes_.tolist()}"
            )
        with torch.no_grad():
            self._take(rows, one_hot(labels, self.classes_))
        return self


class SampledFeaturesRegressor(Regressor, _Sampled):
    """SampledFeaturesClassifier for continuous targets; see there."""

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Add a batch of rows; the first one gives the scales of inputs and targets, and the pairs of "swim"."""
        self._check_settings()
        first = "_stream_" not in self.__dict__
        rows, targets = self._checked(X, y, reset=first)
        columns = self._encoded(targets, Alone())
        if not first and columns.shape[1] != len(self._targets_.mean):
            raise ValueError(
                f"{columns.shape[1]} targets, but the first batch had {len(self._targets_.mean)}"
            )
        with torch.no_grad():
            self._take(rows, columns)
        return self


class _Boosted(_Drawn):
    def __init__(
        self,
        width: int = 256,
        num_layers: int = 4,
        new_features: int = 256,
        features: str = "swim",
        activation: str = "relu",
        rate: float = 0.5,
        ridge: Strength = "gcv",
        layer_ridge: float = 1e-3,
        sweeps: int = 0,
        agop_rounds: int = 0,
        image_shape: tuple[int, ...] | None = None,
        random_state: Any = None,
    ) -> None:
        self.width = width
        self.num_layers = num_layers
        self.new_features = new_features
        self.features = features
        self.activation = activation
        self.rate = rate
        self.ridge = ridge
        self.layer_ridge = layer_ridge
        self.sweeps = sweeps
        self.agop_rounds = agop_rounds
        self.image_shape = image_shape
        self.random_state = random_state

    def _check_settings(self) -> None:
        super()._check_settings()
        at_least({"new_features": self.new_features}, 2)
        at_least({"sweeps": self.sweeps}, 0)
        if self.layer_ridge == "gcv":
            raise ConfigError("layer_ridge cannot be 'gcv'", expected="a positive number")
        check_strength("layer_ridge", self.layer_ridge)
        if not 0 < self.rate <= 2:
            raise ConfigError(f"rate cannot be {self.rate!r}", expected="above 0 and at most 2")

    def _build(
        self, data: Prepared, x: Tensor, generator: torch.Generator, ranks: Ranks
    ) -> ClosedFormNetwork:
        how = Boosting(
            self.width, self.num_layers, self.new_features, self.rate, self.ridge, self.layer_ridge
        )
        network = boosted(x, data.y, self._sampler(generator, ranks), how, ranks)
        self.sweeps_taken_ = [sweep(network, x, data.y, how, ranks) for _ in range(self.sweeps)]
        return network


class BoostedFeaturesClassifier(Classifier, _Boosted):
    """A residual network, grown by closed-form steps: Φ ← standardize(Φ + rate · [f(ΦA), f(XA')] Δ).

    Each Δ minimizes what the best head before it leaves over (gradient boosting of the representation, for squared
    error). width: of Φ. new_features: columns of [f(ΦA), f(XA')], half each. layer_ridge: of Δ. sweeps: how often
    every Δ is solved again given the others; `sweeps_taken_` has (layers changed, objective) of each.
    features, activation, ridge, agop_rounds, image_shape: as in SampledFeaturesClassifier.
    Source: RFRBoost (arXiv 2501.18283).
    """


class BoostedFeaturesRegressor(Regressor, _Boosted):
    """BoostedFeaturesClassifier for continuous targets; see there."""


class _Projected(ClosedForm):
    layer_ridge: Strength

    def __init__(
        self,
        width: int = 512,
        num_layers: int = 2,
        activation: str = "relu",
        ridge: Strength = "gcv",
        layer_ridge: Strength = 1e-2,
        agop_rounds: int = 0,
        random_state: Any = None,
    ) -> None:
        self.width = width
        self.num_layers = num_layers
        self.activation = activation
        self.ridge = ridge
        self.layer_ridge = layer_ridge
        self.agop_rounds = agop_rounds
        self.random_state = random_state

    def _check_settings(self) -> None:
        super()._check_settings()
        check_strength("layer_ridge", self.layer_ridge)

    def _build(
        self, data: Prepared, x: Tensor, generator: torch.Generator, ranks: Ranks
    ) -> ClosedFormNetwork:
        return projected(
            x,
            data.y,
            generator,
            ranks,
            width=self.width,
            num_layers=self.num_layers,
            activation=self.activation,
            layer_ridge=self.layer_ridge,
            strength=self.ridge,
        )


class ForwardProjectionClassifier(Classifier, _Projected):
    """A perceptron whose layers are regressed, one after the other, on sign(hidden Q) + sign(labels U).

    Q and U are random: no errors and no gradients travel backward. layer_ridge: of those regressions; ridge: of the
    head. Source: O'Shea et al. 2025 (arXiv 2501.16476).
    """


class ForwardProjectionRegressor(Regressor, _Projected):
    """ForwardProjectionClassifier for continuous targets; see there."""


_Estimator = TypeVar("_Estimator", bound=ClosedForm)


def fit_sharded(estimator: _Estimator, X: Any, y: Any, transport: Transport | None = None) -> _Estimator:
    """Fit one estimator to rows that lie on several ranks; every rank calls it with its own, and ends with the same.

    transport: of the ranks; None: torch.distributed's default group (gloo). Features are drawn by rank 0's
    random_state, pairs for "swim" from its rows; apart from "swim" the weights are those of all rows in one place,
    up to rounding. Rounds: one all-reduce of a Gram matrix in float64, or one a layer where layers are fitted, and for
    every trial of a sweep and AGOP round; besides settings, classes, scales and rank 0's solutions, which are small.
    Raises PlanMismatch where ranks have other settings or one cannot start, TransportError where one is lost.
    """
    if not isinstance(estimator, ClosedForm):
        raise ConfigError(
            f"a {type(estimator).__name__} cannot be fitted over ranks", expected="a closed-form estimator"
        )
    if transport is None:
        if not dist.is_initialized() or dist.group.WORLD is None:
            raise ConfigError(
                "there is no process group to fit over",
                fix="torch.distributed.init_process_group('gloo'), or transport=...",
            )
        transport = ProcessGroupTransport(dist.group.WORLD)
    return estimator.fit_on(X, y, Sharded(transport))
