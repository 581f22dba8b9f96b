"""Numbers about matrices: the entropy of singular values, and the balance of factors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from efficient_dl.depth.factorize import factored_layers


@torch.no_grad()
def effective_rank(weight: Tensor) -> float:
    """exp(−Σ p log p), p = σ/Σσ: from 1.0 for rank one to min(rows, columns) for equal singular values.

    weight: (rows, ...), later axes flattened; computed in float64. 0.0 for zeros, NaN for non-finite values.
    Source: Roy & Vetterli 2007.
    """
    if not bool(weight.isfinite().all()):
        return float("nan")
    s = torch.linalg.svdvals(weight.double().flatten(1))
    if not bool(s.any()):
        return 0.0
    return float(torch.special.entr(s / s.sum()).sum().exp())


@torch.no_grad()
def imbalance(model: nn.Module) -> float:
    """The largest ‖W_{j+1}ᵀW_{j+1} − W_jW_jᵀ‖_F / ‖W_jW_jᵀ‖_F of a factored model: 0.0 up to rounding at the start.

    Raises ConfigError if nothing is factored.
    """
    worst = 0.0
    for layer in factored_layers(model).values():
        factors = [factor.double() for factor in layer.factors]
        for first, second in itertools.pairwise(factors):
            outer = first @ first.T
            worst = max(worst, float((second.T @ second - outer).norm() / outer.norm()))
    return worst
