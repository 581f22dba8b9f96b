"""Everything a ridge regression must know of its rows, in sums: over rows, batches and ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from efficient_dl.closed_form.network import CHUNK_ROWS
from efficient_dl.closed_form.ranks import Ranks
from efficient_dl.errors import ConfigError

Strength = float | Literal["gcv"]
# Strengths that generalized cross-validation chooses from, in units of a standardized feature's variance.
GCV_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-20, 5))


@dataclass(frozen=True)
class Moments:
    """Sums over rows of features f (m) and targets y (c), float64: count, f, y, fᵀf (m, m), fᵀy (m, c), y² (c)."""

    count: Tensor
    features: Tensor
    targets: Tensor
    gram: Tensor
    cross: Tensor
    squares: Tensor

    @staticmethod
    def of(features: Tensor, targets: Tensor) -> Moments:
        count = torch.tensor(float(len(features)), dtype=torch.float64)
        sums = features.sum(0), targets.sum(0)
        products = features.T @ features, features.T @ targets, targets.square().sum(0)
        return Moments(count, *sums, *products)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> list[Tensor]:
        return [self.count, self.features, self.targets, self.gram, self.cross, self.squares]

    def over(self, ranks: Ranks) -> Moments:
        """Those of all ranks' rows: one round of communication."""
        return Moments(*ranks.sum(self.parts))

    def centred(self) -> Centred:
        f, y = self.features / self.count, self.targets / self.count
        return Centred(
            int(self.count),
            f,
            y,
            self.gram / self.count - torch.outer(f, f),
            self.cross / self.count - torch.outer(f, y),
            self.squares / self.count - y.square(),
        )


@dataclass(frozen=True)
class Centred:
    """Means, and covariances with 1/n: of features (m, m), of features and targets (m, c), of targets (c)."""

    count: int
    features: Tensor
    targets: Tensor
    gram: Tensor
    cross: Tensor
    variances: Tensor

    def first(self, num_features: int) -> Centred:
        """The same without the features from this one on."""
        m = num_features
        return Centred(
            self.count,
            self.features[:m],
            self.targets,
            self.gram[:m, :m],
            self.cross[:m],
            self.variances,
        )


@dataclass(frozen=True)
class Ridge:
    """targets ≈ features · weight + bias. objective: mean squared error + strength · ‖weight‖², its minimum."""

    weight: Tensor
    bias: Tensor
    strength: float
    objective: float


def moments(
    rows: int, features: Callable[[slice], Tensor], targets: Callable[[slice], Tensor], ranks: Ranks
) -> Centred:
    """Of all ranks' rows; features are made chunk by chunk, so that all of them never exist at once."""
    total: Moments | None = None
    for part in chunks(rows):
        one = Moments.of(features(part), targets(part))
        total = one if total is None else total + one
    assert total is not None
    return total.over(ranks).centred()


def chunks(rows: int) -> Iterable[slice]:
    """Slices of CHUNK_ROWS rows each, the last one shorter."""
    return (slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS))


def agreed_ridge(stats: Centred, strength: Strength, ranks: Ranks) -> Ridge:
    """Rank 0's `ridge`, on all ranks: other processors may round differently, and decide differently."""
    own = ridge(stats, strength)
    numbers = torch.tensor([own.strength, own.objective], dtype=torch.float64)
    flat = ranks.first(torch.cat([own.weight.reshape(-1), own.bias, numbers]))
    weight, bias, numbers = flat.split([own.weight.numel(), own.bias.numel(), 2])
    return Ridge(weight.view(own.weight.shape), bias, float(numbers[0]), float(numbers[1]))


def ridge(stats: Centred, strength: Strength) -> Ridge:
    """The minimum of mean ‖y − fW − b‖² + strength · ‖W‖²; b is not penalized.

    "gcv" takes the strength of GCV_STRENGTHS with the least generalized cross-validation error, which the moments
    alone give (Golub, Heath & Wahba 1979). Raises ConfigError where rounding leaves the matrix without an inverse.
    """
    if strength == "gcv":
        strength = _best_strength(stats)
    matrix = stats.gram + strength * torch.eye(len(stats.gram), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed) or not bool(factor.isfinite().all()):
        raise ConfigError(
            "the features' Gram matrix has no inverse at this strength of the ridge",
            found=f"ridge {strength:g}",
            fix="take a larger one, or 'gcv'",
        )
    weight = torch.cholesky_solve(stats.cross, factor)
    bias = stats.targets - stats.features @ weight
    objective = float(stats.variances.sum() - (weight * stats.cross).sum())
    return Ridge(weight, bias, float(strength), objective)


def sandwich(gram: Tensor, cross: Tensor, outer: Tensor, strength: float) -> Tensor:
    """The minimum over Δ of mean ‖r − f Δ W‖² + strength · ‖Δ‖²: (m, p).

    gram: of f, (m, m), 1/n. cross: of f and r, (m, c), 1/n. outer: W (p, c). With fᵀf = V diag(s) Vᵀ and
    W Wᵀ = U diag(w) Uᵀ it is V [(Vᵀ fᵀr Wᵀ U) / (strength + s wᵀ)] Uᵀ. Source: RFRBoost (arXiv 2501.18283).
    """
    s, v = torch.linalg.eigh(gram)
    w, u = torch.linalg.eigh(outer @ outer.T)
    scaled = (v.T @ cross @ outer.T @ u) / (strength + torch.outer(s.clamp(min=0), w.clamp(min=0)))
    return v @ scaled @ u.T


def _best_strength(stats: Centred) -> float:
    s, v = torch.linalg.eigh(stats.gram)
    s = s.clamp(min=0)
    explained = (v.T @ stats.cross).square().sum(1)
    total = float(stats.variances.sum())
    errors: dict[float, float] = {}
    for strength in GCV_STRENGTHS:
        residual = total - float((explained * (s + 2 * strength) / (s + strength).square()).sum())
        freedom = 1 - (float((s / (s + strength)).sum()) + 1) / stats.count
        if freedom > 1e-3:  # else the fit goes through the rows, and both are rounding errors
            errors[strength] = max(residual, 0.0) / freedom**2
    return min(errors, key=lambda one: errors[one]) if errors else max(GCV_STRENGTHS)
