"""Going on after a closed-form fit: a metric from the network's gradients, and layers solved once more."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.closed_form.fits import Boosting, head_of, solve_head
from efficient_dl.closed_form.gram import chunks, moments, sandwich
from efficient_dl.closed_form.network import BoostedLayer, ClosedFormNetwork
from efficient_dl.closed_form.ranks import Ranks

NUM_HALVINGS = 3  # of a re-solved layer's step, before the layer stays as it was


def metric(network: ClosedFormNetwork, transform: Tensor | None, x: Tensor, ranks: Ranks) -> Tensor:
    """M^{1/4}, (d, d), symmetric, of mean square 1 an axis: M is the mean over rows of ∇f ∇fᵀ, summed over outputs.

    x: (rows, d), scaled, before `transform`; gradients are with respect to it. As distances of x M^{1/4} are those of
    x in the metric M^{1/2}, this is a round of a recursive feature machine with the power ½. The identity where all
    gradients are zero. Source: Radhakrishnan et al. 2024 (AGOP; arXiv 2212.13881).
    """
    d = x.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64)
    for part in chunks(len(x)):
        rows = x[part].clone().requires_grad_()
        with torch.enable_grad():
            scores = network.head(network.hidden(rows if transform is None else rows @ transform))
            for output in range(scores.shape[1]):
                (grad,) = torch.autograd.grad(scores[:, output].sum(), rows, retain_graph=True)
                total += grad.T @ grad
    (total,) = ranks.sum([total])
    values, vectors = torch.linalg.eigh(total)
    roots = values.clamp(min=0) ** 0.25
    if not bool(roots.any()):
        return torch.eye(d, dtype=torch.float64)
    return ranks.first((vectors * (roots / roots.square().mean().sqrt())) @ vectors.T)


def sweep(network: ClosedFormNetwork, x: Tensor, y: Tensor, how: Boosting, ranks: Ranks) -> tuple[int, float]:
    """Solve every boosted layer's Δ once more, the others fixed; in place. Returns layers changed and the objective.

    What a layer adds reaches the head through the later layers' scales, as if their features did not depend on it.
    They do, so a solution is taken only if the objective of the head that is then best falls, else half the way to
    it, and so on. One pass over the rows for each trial, with a round of communication.
    """
    with torch.no_grad():
        head = solve_head(network, x, y, how.ridge, ranks)
        network.head = head_of(head)
        strength = head.strength  # "gcv" chooses once, so that objectives can be compared
        best, changed = head.objective, 0
        for index, layer in enumerate(network.layers):
            assert isinstance(layer, BoostedLayer)
            old = layer.step.weight.clone()
            solution = _solved(network, index, x, y, how, ranks)
            for halving in range(NUM_HALVINGS + 1):
                layer.step.weight.copy_(old + (solution - old) / 2**halving)
                fit = solve_head(network, x, y, strength, ranks)
                if fit.objective < best:
                    best, changed = fit.objective, changed + 1
                    network.head = head_of(fit)
                    break
            else:
                layer.step.weight.copy_(old)
    return changed, best


def _solved(
    network: ClosedFormNetwork, index: int, x: Tensor, y: Tensor, how: Boosting, ranks: Ranks
) -> Tensor:
    """The layer's Δᵀ with which [features] Δ (scales) W would best explain what the rest leaves of the targets."""
    layer = network.layers[index]
    assert isinstance(layer, BoostedLayer)
    outer = network.head.weight.T.clone()  # (p, c)
    for later in network.layers[index:]:
        assert isinstance(later, BoostedLayer)
        outer /= later.scale.std[:, None]

    def features(part: slice) -> Tensor:
        return layer.features(_before(network, index, x[part]), x[part])

    def remainder(part: slice) -> Tensor:
        own = layer.step(features(part)) @ outer
        return y[part] - network.head(network.hidden(x[part])) + own

    stats = moments(len(x), features, remainder, ranks)
    # The step holds the rate, so its penalty is the layer's own divided by the rate's square.
    return ranks.first(sandwich(stats.gram, stats.cross, outer, how.layer_ridge / how.rate**2).T.contiguous())


def _before(network: ClosedFormNetwork, index: int, x: Tensor) -> Tensor:
    hidden = network.stem(x)
    for layer in network.layers[:index]:
        hidden = layer(hidden, x)
    return hidden
