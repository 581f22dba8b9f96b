"""Networks fitted in closed form: solutions are minima, batches and modules agree, refits help."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits, make_moons
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

from efficient_dl import closed_form as cf
from efficient_dl.closed_form.fits import Boosting, boosted, solve_head
from efficient_dl.closed_form.gram import GCV_STRENGTHS, Moments, ridge, sandwich
from efficient_dl.closed_form.network import BoostedLayer
from efficient_dl.closed_form.ranks import Alone
from efficient_dl.closed_form.refits import sweep
from efficient_dl.closed_form.sampling import SWIM_CONSTANT, Sampler
from efficient_dl.errors import ConfigError

Array = NDArray[np.float64]
CLASSIFIERS = [
    cf.SampledFeaturesClassifier(width=60, num_layers=2, features="swim", random_state=0),
    cf.BoostedFeaturesClassifier(width=30, num_layers=2, new_features=31, sweeps=1, random_state=0),
    cf.ForwardProjectionClassifier(width=60, agop_rounds=1, random_state=0),
]
REGRESSORS = [
    cf.SampledFeaturesRegressor(width=60, agop_rounds=1, random_state=0),
    cf.BoostedFeaturesRegressor(width=30, num_layers=2, new_features=30, features="swim", random_state=0),
    cf.ForwardProjectionRegressor(width=60, random_state=0),
]


def _moons(rows: int = 200, seed: int = 0) -> tuple[Array, NDArray[np.str_]]:
    x, y = make_moons(rows, noise=0.1, random_state=seed)
    return 10 * x + 3, np.where(y == 1, "upper", "lower")


def _waves(rows: int = 200, outputs: int = 2) -> tuple[Array, Array]:
    x = np.random.default_rng(0).normal(size=(rows, 4))
    return x, 100 + 5 * np.stack([np.sin(2 * x[:, 0]), x[:, 1] * x[:, 2]], axis=1)[:, :outputs]


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda one: type(one).__name__)
def test_a_classifier_as_a_module_gives_the_same_scores(estimator: cf.SampledFeaturesClassifier) -> None:
    x, y = _moons()
    estimator.fit(x, y)
    assert estimator.score(x, y) > 0.95
    scores = estimator.to_torch(torch.float64)(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(scores[:, 1] - scores[:, 0], estimator.decision_function(x), atol=1e-12)
    assert np.array_equal(estimator.classes_[scores.argmax(1)], estimator.predict(x))
    single = estimator.to_torch()(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(single, scores, atol=2e-3)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("estimator", REGRESSORS, ids=lambda one: type(one).__name__)
def test_a_regressor_as_a_module_gives_the_same_predictions(
    estimator: cf.SampledFeaturesRegressor, outputs: int
) -> None:
    x, y = _waves(outputs=outputs)
    estimator.fit(x, y if outputs > 1 else y[:, 0])
    predicted = estimator.predict(x)
    assert predicted.shape == ((200, 2) if outputs > 1 else (200,))
    module = estimator.to_torch(torch.float64)
    np.testing.assert_allclose(
        module(torch.tensor(x)).detach().numpy(), predicted.reshape(200, -1), atol=1e-10
    )
    assert estimator.score(x, y if outputs > 1 else y[:, 0]) > 0.5


def test_a_module_is_a_start_for_sgd_and_a_copy() -> None:
    x, y = _waves()
    estimator = cf.BoostedFeaturesRegressor(
        width=20, num_layers=2, new_features=20, ridge=1e-2, random_state=0
    ).fit(x, y)
    before = estimator.predict(x)
    module = estimator.to_torch(torch.float64)
    inputs, targets = torch.tensor(x), torch.tensor(y)
    optimizer = torch.optim.SGD(module.parameters(), 1e-6)
    losses: list[float] = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.mse_loss(module(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(float(np.square(before - y).mean()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(one.grad is not None for one in module.parameters())
    assert np.array_equal(estimator.predict(x), before)


@pytest.mark.parametrize("sizes", [[50] * 4, [50, 149, 1], [50, *[1] * 150]])
def test_batches_of_any_size_give_the_ridge_regression_of_all_rows(sizes: list[int]) -> None:
    x, y = _waves()
    estimator = cf.SampledFeaturesRegressor(width=40, features="random", ridge=1e-3, random_state=0)
    start = 0
    for size in sizes:
        estimator.partial_fit(x[start : start + size], y[start : start + size])
        start += size
    network = estimator.network_
    hidden = network.hidden(network.inputs(torch.tensor(x))).detach().numpy()
    # Their strength is a sum over rows; ours is in units of the targets' deviations, which drop out.
    expected = Ridge(alpha=1e-3 * len(x)).fit(hidden, y)
    np.testing.assert_allclose(network.head.weight.numpy(), expected.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(estimator.predict(x), expected.predict(hidden), rtol=1e-8)


def test_a_stream_says_what_it_cannot_take() -> None:
    x, y = _moons()
    estimator = cf.SampledFeaturesClassifier(width=10, random_state=0)
    with pytest.raises(ValueError, match="1 class"):
        estimator.partial_fit(x[:3], ["lower"] * 3)
    estimator.partial_fit(x[:3], ["lower"] * 3, classes=["lower", "upper"])
    estimator.partial_fit(x, y)
    with pytest.raises(ValueError, match="none of the classes"):
        estimator.partial_fit(x[:2], ["left", "upper"])
    with pytest.raises(ValueError, match="the first batch had"):
        estimator.partial_fit(x, y, classes=["left", "upper"])
    with pytest.raises(ConfigError, match="AGOP"):
        cf.SampledFeaturesClassifier(agop_rounds=1).partial_fit(x, y)


def test_a_fit_after_a_stream_begins_anew() -> None:
    x, y = _moons()
    estimator = cf.SampledFeaturesClassifier(width=10, random_state=0)
    expected = estimator.fit(x, y).decision_function(x)
    estimator.partial_fit(-x, y).fit(x, y)
    assert np.array_equal(estimator.decision_function(x), expected)


def test_the_sandwich_is_the_minimum() -> None:
    torch.manual_seed(0)
    f, r = torch.randn(30, 5).double(), torch.randn(30, 3).double()
    w, strength = torch.randn(4, 3).double(), 0.1
    step = sandwich(f.T @ f / 30, f.T @ r / 30, w, strength).requires_grad_()
    loss = (r - f @ step @ w).square().sum() / 30 + strength * step.square().sum()
    (grad,) = torch.autograd.grad(loss, step)
    assert float(grad.norm()) < 1e-12


def test_a_boosted_layer_is_standardized_by_the_moments_alone() -> None:
    x, y = (torch.tensor(one) for one in _waves())
    sampler = Sampler("random", "tanh", torch.Generator().manual_seed(0), Alone())
    network = boosted(x, y, sampler, Boosting(10, 2, 12, 0.5, 1e-3, 1e-3), Alone())
    hidden = network.hidden(x)
    torch.testing.assert_close(hidden.mean(0), torch.zeros(10).double(), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(hidden.var(0, unbiased=False), torch.ones(10).double())


def test_a_hidden_column_that_never_varies_is_not_blown_up() -> None:
    x, y = (torch.tensor(one) for one in _waves())
    network = boosted(
        torch.cat([x, torch.full((200, 1), 1e3).double()], dim=1),
        y,
        Sampler("random", "tanh", torch.Generator().manual_seed(0), Alone()),
        Boosting(10, 2, 12, 0.5, 1e-3, 1e-3),
        Alone(),
    )
    for layer in network.layers:
        assert isinstance(layer, BoostedLayer)
        assert bool((layer.scale.std > 1e-6).all())


def test_every_layer_lowers_the_training_error() -> None:
    x, y = _waves()
    settings = {"width": 20, "new_features": 20, "ridge": 1e-4, "random_state": 0}
    errors = [
        1 - cf.BoostedFeaturesRegressor(num_layers=layers, **settings).fit(x, y).score(x, y)
        for layers in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_generalized_cross_validation_takes_the_strength_with_the_least_error() -> None:
    rng = np.random.default_rng(0)
    f = torch.tensor(rng.normal(size=(60, 20)))
    y = f[:, :1] + torch.tensor(rng.normal(size=(60, 1)))
    stats = Moments.of(f, y).centred()

    def error(strength: float) -> float:
        centred = f - f.mean(0)
        hat = centred @ torch.linalg.solve(centred.T @ centred + 60 * strength * torch.eye(20), centred.T)
        residual = y - y.mean() - hat @ (y - y.mean())
        return float(residual.square().mean() / (1 - (hat.trace() + 1) / 60) ** 2)

    assert ridge(stats, "gcv").strength == min(GCV_STRENGTHS, key=error)


def test_swim_puts_the_two_rows_of_a_pair_at_both_ends() -> None:
    x, y = torch.tensor([[0.0, 1.0], [4.0, 1.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
    features = Sampler("swim", "tanh", torch.Generator().manual_seed(0), Alone()).features(x, y, 6)
    potentials = features.linear(x)
    torch.testing.assert_close(potentials.abs(), torch.full((2, 6), SWIM_CONSTANT).double())
    assert bool((potentials[0] * potentials[1] < 0).all())


def test_swim_prefers_pairs_where_targets_change_fast() -> None:
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    sampler = Sampler("swim", "tanh", torch.Generator().manual_seed(0), Alone())
    features = sampler.features(x, (x > 0.5).double(), 200)
    middles = -features.linear.bias / features.linear.weight[:, 0]  # where the potential is 0
    assert float((middles - 0.5).abs().median()) < 0.2
    uniform = Sampler("random", "tanh", torch.Generator().manual_seed(0), Alone()).features(x, x, 200)
    middles = -uniform.linear.bias / uniform.linear.weight[:, 0]
    assert float((middles - 0.5).abs().median()) > 0.5


@pytest.mark.parametrize("shape", [(12, 9), (2, 6, 9), (1, 2, 2)], ids=str)
def test_fields_see_a_rectangle_of_all_channels_and_have_variance_1(shape: tuple[int, ...]) -> None:
    high, wide = shape[-2:]
    x = torch.randn(500, int(np.prod(shape)), dtype=torch.float64)
    sampler = Sampler("fields", "relu", torch.Generator().manual_seed(0), Alone(), shape)
    linear = sampler.features(x, x[:, :1], 40).linear
    seen = (linear.weight != 0).view(40, -1, high, wide)
    assert (seen == seen[:, :1]).all()
    rows, columns = seen[:, 0].any(2), seen[:, 0].any(1)
    assert (seen[:, 0] == rows[:, :, None] & columns[:, None, :]).all()
    for lines, side in ((rows, high), (columns, wide)):
        edges = (lines[:, 1:] != lines[:, :-1]).sum(1)
        assert (edges <= 2).all() and (edges - (lines[:, 0] ^ lines[:, -1]).long() != 1).all()
        lengths = lines.sum(1)
        assert lengths.min() >= min(3, side) and lengths.max() <= min(8, side)
    torch.testing.assert_close(linear(x).std(0, correction=0), torch.ones(40, dtype=torch.float64))


def test_fields_that_cannot_be_drawn_say_why() -> None:
    x, y = load_digits(return_X_y=True)
    boosted = cf.BoostedFeaturesClassifier(20, 1, 20, features="fields", image_shape=(8, 8), random_state=0)
    assert boosted.fit(x, y).score(x, y) > 0.8
    for settings, words in (
        ({"image_shape": (8, 9)}, "72 columns"),
        ({}, "image_shape"),
        ({"image_shape": (64,)}, "(channels, height, width)"),
        ({"image_shape": (8, 8), "agop_rounds": 1}, "AGOP"),
    ):
        with pytest.raises(ConfigError) as caught:
            cf.SampledFeaturesClassifier(20, features="fields", **settings).fit(x, y)
        assert words in str(caught.value)


def test_sweeps_never_raise_the_objective() -> None:
    x, y = (torch.tensor(one) for one in _waves())
    sampler = Sampler("random", "tanh", torch.Generator().manual_seed(0), Alone())
    how = Boosting(12, 3, 12, 0.5, 1e-3, 1e-3)
    network = boosted(x, y, sampler, how, Alone())
    objectives = [solve_head(network, x, y, how.ridge, Alone()).objective]
    changes = 0
    for _ in range(3):
        changed, objective = sweep(network, x, y, how, Alone())
        objectives.append(objective)
        changes += changed
    assert objectives == sorted(objectives, reverse=True)
    assert changes > 0 and objectives[-1] < 0.95 * objectives[0]
    again = solve_head(network, x, y, how.ridge, Alone())
    assert again.objective == pytest.approx(objectives[-1])
    torch.testing.assert_close(network.head.weight, again.weight.T)


def test_agop_rounds_find_the_inputs_that_matter() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 20))
    y = x[:, 0] * x[:, 1]
    fitted = [
        cf.SampledFeaturesRegressor(
            width=300, features="random", ridge=1e-2, agop_rounds=rounds, random_state=0
        ).fit(x[:600], y[:600])
        for rounds in (0, 2)
    ]
    scores = [one.score(x[600:], y[600:]) for one in fitted]
    assert scores[1] > 0.85 > scores[0] + 0.3
    kept = fitted[1].network_.inputs[1].weight.diagonal()
    assert sorted(kept.topk(2).indices.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (cf.SampledFeaturesClassifier(width=0), "width"),
        (cf.SampledFeaturesClassifier(features="sim"), "features 'sim'"),
        (cf.SampledFeaturesClassifier(activation="rleu"), "activation 'rleu'"),
        (cf.SampledFeaturesClassifier(ridge=0.0), "ridge"),
        (cf.SampledFeaturesClassifier(agop_rounds=-1), "agop_rounds"),
        (cf.BoostedFeaturesClassifier(rate=0.0), "rate"),
        (cf.BoostedFeaturesClassifier(layer_ridge="gcv"), "layer_ridge"),  # type: ignore[arg-type]
        (cf.ForwardProjectionClassifier(num_layers=0), "num_layers"),
    ],
)
def test_settings_out_of_range_are_named(estimator: cf.SampledFeaturesClassifier, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimator.fit(*_moons())


def test_digits_in_a_second_and_a_grid_search_around_it() -> None:
    x, y = load_digits(return_X_y=True)
    search = GridSearchCV(
        cf.SampledFeaturesClassifier(width=400, random_state=0), {"ridge": [1e-3, "gcv"]}, cv=2
    ).fit(x[:1200], y[:1200])
    assert search.score(x[1200:], y[1200:]) > 0.94


def test_without_scikit_learn_the_error_says_what_to_install() -> None:
    script = """
import sys
sys.modules["sklearn"] = None
import efficient_dl
from efficient_dl.errors import PackageMissing
try:
    efficient_dl.closed_form
except PackageMissing as error:
    sys.exit("efficient_dl[data]" not in str(error))
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_float64_survives_large_offsets() -> None:
    x, y = _waves()
    plain = cf.SampledFeaturesRegressor(width=40, random_state=0).fit(x, y)
    moved = cf.SampledFeaturesRegressor(width=40, random_state=0).fit(x + 1e6, y + 1e6)
    np.testing.assert_allclose(moved.predict(x + 1e6) - 1e6, plain.predict(x), atol=1e-4)
