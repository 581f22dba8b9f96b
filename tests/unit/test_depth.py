"""Balanced factors: the same function, the same names after folding, and the motion that theory predicts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_dl.depth import (
    FactoredConv2d,
    FactoredLinear,
    balanced_factors,
    effective_rank,
    factor_penalty,
    factored_layers,
    factorize,
    fold,
    folded_state_dict,
    imbalance,
    precondition,
    schatten,
    schatten_penalty,
)
from efficient_dl.depth.preconditioner import Basis
from efficient_dl.errors import ConfigError

SHAPES = [(5, 5), (7, 4), (4, 7)]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 10, bias=False))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_factored_model_is_the_same_function_and_folds_to_the_old_names(n: int) -> None:
    model = _net()
    x, before = torch.randn(4, 3, 6, 6), copy.deepcopy(model.state_dict())
    expected = model(x)
    assert factorize(model, n) is model
    assert isinstance(model[0], FactoredConv2d) and isinstance(model[3], FactoredLinear)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert imbalance(model) < 1e-5

    state = folded_state_dict(model)
    fold(model)
    assert {name: one.shape for name, one in model.state_dict().items()} == {
        name: one.shape for name, one in before.items()
    }
    _net().load_state_dict(state)  # strictly
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(value, state[name])
    assert type(model[0]) is nn.Conv2d and type(model[3]) is nn.Linear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3])
def test_factors_are_balanced_and_multiply_to_the_matrix(shape: tuple[int, int], n: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    factors = balanced_factors(matrix, n)
    product = factors[0]
    for first, second in itertools.pairwise(factors):
        torch.testing.assert_close(second.T @ second, first @ first.T)
        product = second @ product
    torch.testing.assert_close(product, matrix)


def test_a_factored_convolution_is_one_of_its_kernel_and_then_some_of_one_by_one() -> None:
    layer = nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=1, dilation=2, dtype=torch.float64)
    factored = FactoredConv2d(layer, 3)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    first, second, third = factored.factors
    y = F.conv2d(x, first.view(6, 3, 3, 2), stride=(1, 2), padding=1, dilation=2)
    y = F.conv2d(F.conv2d(y, second[:, :, None, None]), third[:, :, None, None], factored.bias)
    torch.testing.assert_close(factored(x), y)
    torch.testing.assert_close(layer(x), y)


def test_a_factored_layer_can_begin_anew_in_balance() -> None:
    model = factorize(nn.Sequential(nn.Linear(6, 4)), 3)
    layer = factored_layers(model)["0"]
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.allclose(layer.weight, before)
    assert imbalance(model) < 1e-5


def test_a_bare_layer_becomes_another_object_and_keeps_mode_and_frozen_parameters() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False).eval()
    factored = factorize(layer, 2)
    assert not factored.training and not any(one.requires_grad for one in factored.parameters())
    back = fold(factored)
    assert isinstance(back, nn.Linear) and not back.training and not back.weight.requires_grad


def test_a_layer_used_twice_stays_one_layer() -> None:
    layer = nn.Linear(4, 4)
    model = factorize(nn.Sequential(layer, nn.ReLU(), layer), 2)
    assert isinstance(model, nn.Sequential) and model[0] is model[2]
    assert set(folded_state_dict(model)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    fold(model)
    assert model[0] is model[2]


class _Own(nn.Linear):
    pass


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def _zeros() -> nn.Module:
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    return layer


def _hooked() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "2 matrices"),
        (lambda: _Own(3, 3), "two classes"),
        (_tied, "shares its weight"),
        (_zeros, "zeros"),
        (_hooked, "hooks"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "parametrization"),
        (lambda: nn.MultiheadAttention(4, 2), "NonDynamicallyQuantizableLinear"),
        (nn.ReLU, "no layer"),
    ],
)
def test_what_cannot_be_factored_is_an_error_that_changes_nothing(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), make()) if make is not nn.ReLU else nn.ReLU()
    modules = list(model.modules())
    with pytest.raises(ConfigError, match=message):
        factorize(model, 2)
    assert list(model.modules()) == modules


def test_patterns_choose_layers_and_wrong_ones_are_errors() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="no module is called 'head'"):
        factorize(model, exclude=["head"])
    with pytest.raises(ConfigError, match="LayerNorm"):
        factorize(model, include=["1"])
    with pytest.raises(ConfigError, match="two factors"):
        factorize(model, 1)
    factorize(model, exclude=["2"])
    assert list(factored_layers(model)) == ["0"]
    with pytest.raises(ConfigError, match="factorize"):
        fold(nn.Linear(2, 2))


def _folded_step(matrix: Tensor, grad: Tensor, n: int, rate: float, decay: float = 0.0) -> Tensor:
    """What one step of gradient descent on balanced factors makes of their product."""
    factors = [one.requires_grad_() for one in balanced_factors(matrix, n)]
    product = factors[0]
    for factor in factors[1:]:
        product = factor @ product
    optimizer = torch.optim.SGD(factors, rate, weight_decay=decay)
    (product * grad).sum().backward()
    optimizer.step()
    product = factors[0]
    for factor in factors[1:]:
        product = factor @ product
    return product.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_preconditioner_is_a_step_of_the_factors_up_to_the_rate_squared(
    shape: tuple[int, int], n: int
) -> None:
    torch.manual_seed(1)
    matrix, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    if n == 1:
        assert torch.equal(precondition(grad, Basis.of(matrix), 1), grad)
        return
    errors = []
    for rate in (1e-3, 1e-4):
        predicted = matrix - rate * precondition(grad, Basis.of(matrix), n)
        errors.append(float((_folded_step(matrix, grad, n, rate) - predicted).norm()))
    assert errors[0] < 0.01 * float(matrix.norm())
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)  # quadratic in the rate


def test_decay_of_the_factors_is_n_times_that_of_the_product_up_to_the_rate_squared() -> None:
    torch.manual_seed(2)
    matrix, n, decay = torch.randn(6, 4, dtype=torch.float64), 3, 0.3
    grad = torch.randn_like(matrix)
    errors = []
    for rate in (1e-3, 1e-4):
        moved = precondition(grad, Basis.of(matrix), n) + n * decay * matrix
        errors.append(float((_folded_step(matrix, grad, n, rate, decay) - matrix + rate * moved).norm()))
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


def test_the_formula_is_the_one_with_fractional_powers_of_gram_matrices() -> None:
    torch.manual_seed(3)
    w, g = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)

    def power(gram: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return vectors @ torch.diag(values**exponent) @ vectors.T

    n = 5
    expected = sum(power(w @ w.T, (n - j) / n) @ g @ power(w.T @ w, (j - 1) / n) for j in range(1, n + 1))
    torch.testing.assert_close(precondition(g, Basis.of(w), n), expected)


def test_small_steps_keep_the_balance_and_large_ones_do_not() -> None:
    def after(rate: float, steps: int) -> float:
        torch.manual_seed(0)
        model = factorize(nn.Linear(6, 4, dtype=torch.float64), 3)
        optimizer = torch.optim.SGD(model.parameters(), rate)
        x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return imbalance(model)

    assert after(1e-3, 300) < 0.01 < after(0.3, 30)


@pytest.mark.parametrize("n", [2, 3])
def test_weight_decay_of_balanced_factors_is_a_schatten_penalty(n: int) -> None:
    model = _net().double()
    plain = schatten_penalty(model, n)
    factorize(model, n)
    torch.testing.assert_close(factor_penalty(model), plain, rtol=1e-6, atol=0.0)
    layer = factored_layers(model)["3"]
    with torch.no_grad():  # the same product out of balance costs more
        layer.factors[0].mul_(2)
        layer.factors[1].div_(2)
    assert bool(factor_penalty(model) > plain)


@pytest.mark.parametrize("p", [2 / 3, 1.0, 2.0])
def test_the_schatten_penalty_has_its_own_gradient(p: float) -> None:
    weight = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: schatten(one, p), weight)
    singular = torch.linalg.svdvals(weight.detach().flatten(1))
    torch.testing.assert_close(schatten(weight, p).detach(), (singular**p).sum(), rtol=1e-6, atol=1e-6)
    twins = torch.eye(3, dtype=torch.float64, requires_grad=True)  # repeated singular values
    schatten(twins, p).backward()
    assert twins.grad is not None
    torch.testing.assert_close(twins.grad, p * torch.eye(3, dtype=torch.float64))
    with pytest.raises(ConfigError):
        schatten(weight, 0.0)


def test_the_effective_rank_counts_equal_singular_values() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(1.7548, abs=1e-4)
    assert effective_rank(torch.zeros(2, 2)) == 0.0
