"""The three ways to fit a network, each from scaled inputs x (rows, d) and targets y (rows, c) in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from efficient_dl.closed_form.gram import (
    Centred,
    Ridge,
    Strength,
    agreed_ridge,
    chunks,
    moments,
    ridge,
    sandwich,
)
from efficient_dl.closed_form.network import (
    BoostedLayer,
    ClosedFormNetwork,
    Features,
    Scale,
    StackedLayer,
    deviation,
    linear,
)
from efficient_dl.closed_form.ranks import Ranks
from efficient_dl.closed_form.sampling import Sampler


def head_of(fit: Ridge) -> nn.Linear:
    return linear(fit.weight.T.contiguous(), fit.bias.clone())


def solve_head(network: ClosedFormNetwork, x: Tensor, y: Tensor, strength: Strength, ranks: Ranks) -> Ridge:
    """Ridge regression of the targets on what the head sees; the head is not replaced."""
    stats = moments(len(x), lambda part: network.hidden(x[part]), lambda part: y[part], ranks)
    return agreed_ridge(stats, strength, ranks)


_Module = TypeVar("_Module", bound=nn.Module)


def agreed(module: _Module, ranks: Ranks) -> _Module:
    """The module with rank 0's numbers: decompositions on other processors may round differently."""
    tensors = [*module.parameters(), *module.buffers()]
    flat = ranks.first(torch.cat([one.reshape(-1) for one in tensors]))
    for one, values in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        one.copy_(values.view_as(one))
    return module


def by_rows(layer: nn.Module, *tensors: Tensor) -> Tensor:
    """layer(*tensors), a chunk of rows at a time."""
    return torch.cat([layer(*(one[part] for one in tensors)) for part in chunks(len(tensors[0]))])


def sampled(x: Tensor, y: Tensor, sampler: Sampler, width: int, num_layers: int) -> ClosedFormNetwork:
    """Layers of drawn features; the head is zero."""
    hidden, layers = x, list[nn.Module]()
    for _ in range(num_layers):
        layers.append(StackedLayer(sampler.features(hidden, y, width)))
        sampler, hidden = sampler.of_hidden(), by_rows(layers[-1], hidden, x)
    head = linear(torch.zeros(y.shape[1], width).double(), torch.zeros(y.shape[1]).double())
    return ClosedFormNetwork(nn.Identity(), layers, head)


@dataclass(frozen=True)
class Boosting:
    """width: of the hidden values. new_features: of a layer, half of hidden values and half of inputs."""

    width: int
    num_layers: int
    new_features: int
    rate: float
    ridge: Strength
    layer_ridge: float


def boosted(x: Tensor, y: Tensor, sampler: Sampler, how: Boosting, ranks: Ranks) -> ClosedFormNetwork:
    """Random-feature boosting: each layer takes a step against the residual of the best head before it.

    One round of communication a layer, and one for the head. Source: RFRBoost (arXiv 2501.18283), for squared error.
    """
    stem = sampler.features(x, y, how.width)
    hidden, layers = by_rows(stem, x), list[nn.Module]()
    for _ in range(how.num_layers):
        of_hidden = sampler.of_hidden().features(hidden, y, how.new_features - how.new_features // 2)
        of_inputs = sampler.features(x, y, max(how.new_features // 2, 1))

        def both(
            part: slice, hidden: Tensor = hidden, a: Features = of_hidden, b: Features = of_inputs
        ) -> Tensor:
            return torch.cat([hidden[part], a(hidden[part]), b(x[part])], dim=1)

        stats = moments(len(x), both, lambda part: y[part], ranks)
        layers.append(agreed(_boosted_layer(stats, of_hidden, of_inputs, how), ranks))
        hidden = by_rows(layers[-1], hidden, x)
    stats = moments(len(x), lambda part: hidden[part], lambda part: y[part], ranks)
    return ClosedFormNetwork(stem, layers, head_of(agreed_ridge(stats, how.ridge, ranks)))


def _boosted_layer(stats: Centred, of_hidden: Features, of_inputs: Features, how: Boosting) -> BoostedLayer:
    """stats: of [hidden values, new features], which give the step and the scale after it without another look."""
    p = how.width
    head = ridge(stats.first(p), how.ridge)
    new, mixed = stats.gram[p:, p:], stats.gram[p:, :p]
    residual = stats.cross[p:] - mixed @ head.weight
    step = how.rate * sandwich(new, residual, head.weight, how.layer_ridge)
    mean = stats.features[:p] + stats.features[p:] @ step
    variance = stats.gram[:p, :p].diagonal() + 2 * (mixed * step).sum(0) + (step * (new @ step)).sum(0)
    rounding = 1e-13 * mean.square()  # of a difference of sums: such a column is constant
    scale = Scale(mean, deviation(torch.where(variance > rounding, variance, 0.0)))
    return BoostedLayer(of_hidden, of_inputs, linear(step.T.contiguous(), None), scale)


def projected(
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    ranks: Ranks,
    *,
    width: int,
    num_layers: int,
    activation: str,
    layer_ridge: Strength,
    strength: Strength,
) -> ClosedFormNetwork:
    """Forward Projection: a layer's potentials are regressed on sign(hidden Q) + sign(y U), Q and U normal.

    A constant is among the columns of both, for continuous targets' sake: sign(y U) alone would know only the sign of
    a single one (ours). One round of communication a layer. Source: O'Shea et al. 2025 (arXiv 2501.16476).
    """
    hidden, layers = x, list[nn.Module]()
    labels = torch.cat([y, torch.ones(len(y), 1).double()], dim=1)
    for _ in range(num_layers):
        q = torch.randn(hidden.shape[1] + 1, width, generator=generator, dtype=torch.float64)
        u = torch.randn(labels.shape[1], width, generator=generator, dtype=torch.float64)

        def potentials(part: slice, hidden: Tensor = hidden, q: Tensor = q, u: Tensor = u) -> Tensor:
            return (hidden[part] @ q[:-1] + q[-1]).sign() + (labels[part] @ u).sign()

        stats = moments(len(x), lambda part, hidden=hidden: hidden[part], potentials, ranks)
        fit = agreed_ridge(stats, layer_ridge, ranks)
        layers.append(StackedLayer(Features(fit.weight.T.contiguous(), fit.bias.clone(), activation)))
        hidden = by_rows(layers[-1], hidden, x)
    stats = moments(len(x), lambda part: hidden[part], lambda part: y[part], ranks)
    return ClosedFormNetwork(nn.Identity(), layers, head_of(agreed_ridge(stats, strength, ranks)))
