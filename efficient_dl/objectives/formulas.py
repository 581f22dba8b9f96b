"""The losses as formulas over rows of logits, without targets' forms, weights or reductions.

Every loss here is, for a row z of K logits and the class c, common(z) − score(z)[c]. The loss of a distribution over
classes is the mean of its classes' losses, as in cross-entropy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficient_dl.errors import ConfigError

# Of the mass that g(z) = t would give all classes together: what classes without any of their own get of it in
# `probabilities`, shared evenly.
FLOOR_SHARE = 0.01
EXP_LIMIT = 30.0  # e^30 ≈ 1e13: sums over a vocabulary and squares of gradients stay finite in float32
POW3_LIMIT = 1e6  # 0.001·z⁴/4 ≈ 2.5e20 likewise


class Formula(ABC):
    """A loss of rows of logits. z is float32 or float64 (..., K), classes in the last axis, K at least 2."""

    @abstractmethod
    def common(self, z: Tensor) -> Tensor:
        """The part of a row's loss that does not depend on the class: (...)."""

    @abstractmethod
    def score(self, z: Tensor) -> Tensor:
        """What each class takes away from its row's loss: (..., K)."""

    @abstractmethod
    def probabilities(self, z: Tensor) -> Tensor:
        """The outputs as a distribution over classes: (..., K), rows that sum to 1."""

    def log_probabilities(self, z: Tensor) -> Tensor:
        """Natural logarithms of `probabilities`."""
        return self.probabilities(z).log()


class MatchingFormula(Formula):
    """Σ_k G(z_k) − t_k z_k with G′ = g: convex, and its gradient is g(z) − t, with no derivative of g in it.

    Source: Øland 2024, CMU-CS-24-147; matching losses after Auer, Herbster & Warmuth 1996.
    """

    @abstractmethod
    def link(self, z: Tensor) -> Tensor:
        """g, elementwise: the outputs that are compared with the targets."""

    @abstractmethod
    def potential(self, z: Tensor) -> Tensor:
        """G, elementwise: an integral of g, continued linearly where g is clamped."""

    def common(self, z: Tensor) -> Tensor:
        return _PotentialSum.apply(z, self)

    def score(self, z: Tensor) -> Tensor:
        return z

    def probabilities(self, z: Tensor) -> Tensor:
        """max(g(z), FLOOR_SHARE/K), divided by its sum."""
        return _normalized(self.link(z))


class _PotentialSum(torch.autograd.Function):
    """Σ_k G(z_k), whose derivative is g(z), so that autograd keeps nothing of this size but z itself."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, formula: MatchingFormula) -> Tensor:
        ctx.save_for_backward(z)
        ctx.formula = formula
        return formula.potential(z).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * ctx.formula.link(z), None


@dataclass(frozen=True)
class LinearFormula(MatchingFormula):
    """½‖z − t‖² of a one-hot t; of another distribution more by its constant ½(1 − ‖t‖²). g(z) = z."""

    def link(self, z: Tensor) -> Tensor:
        return z

    def potential(self, z: Tensor) -> Tensor:
        return z.square() / 2

    def common(self, z: Tensor) -> Tensor:
        return super().common(z) + 0.5


@dataclass(frozen=True)
class ExpFormula(MatchingFormula):
    """ExpGB: Σ_k αe^{z_k} − t_k z_k, at least 1 − log(1/α). g(z) = αe^z, constant above z = limit.

    alpha: None for 1/K, with which z = 0 means equal probabilities.
    """

    alpha: float | None = None
    limit: float = EXP_LIMIT

    def __post_init__(self) -> None:
        _check_alpha("ExpGB", self.alpha)
        _check_limit("ExpGB", self.limit, 80.0)

    def link(self, z: Tensor) -> Tensor:
        return self._alpha(z) * z.clamp(max=self.limit).exp()

    def potential(self, z: Tensor) -> Tensor:
        return self.link(z) * (1 + (z - self.limit).clamp(min=0))

    def probabilities(self, z: Tensor) -> Tensor:
        """g(z) divided by its sum, which is softmax(z): g is positive, no floor is needed."""
        return z.softmax(-1)

    def log_probabilities(self, z: Tensor) -> Tensor:
        return z.log_softmax(-1)

    def _alpha(self, z: Tensor) -> float:
        return 1 / z.shape[-1] if self.alpha is None else self.alpha


@dataclass(frozen=True)
class Pow3Formula(MatchingFormula):
    """pow3GB: Σ_k αz_k⁴/4 − t_k z_k, at least −¾α^(−1/3). g(z) = αz³, constant beyond |z| = limit."""

    alpha: float = 0.001
    limit: float = POW3_LIMIT

    def __post_init__(self) -> None:
        _check_alpha("pow3GB", self.alpha)
        _check_limit("pow3GB", self.limit, 1e9)

    def link(self, z: Tensor) -> Tensor:
        z = z.clamp(-self.limit, self.limit)
        return self.alpha * z * z * z

    def potential(self, z: Tensor) -> Tensor:
        near = z.clamp(-self.limit, self.limit)
        return self.alpha * near * near * near * (near / 4 + (z - near))


@dataclass(frozen=True)
class CrossEntropyFormula(Formula):
    """−log softmax(z)_c: torch.nn.CrossEntropyLoss."""

    def common(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[:-1])

    def score(self, z: Tensor) -> Tensor:
        return z.log_softmax(-1)

    def probabilities(self, z: Tensor) -> Tensor:
        return z.softmax(-1)

    def log_probabilities(self, z: Tensor) -> Tensor:
        return z.log_softmax(-1)


@dataclass(frozen=True)
class SquentropyFormula(CrossEntropyFormula):
    """−log softmax(z)_c + Σ_{j≠c} z_j² / (K − 1). Source: Hui, Belkin & Wright 2023, arXiv 2302.03952."""

    def common(self, z: Tensor) -> Tensor:
        return z.square().sum(-1) / (z.shape[-1] - 1)

    def score(self, z: Tensor) -> Tensor:
        return z.log_softmax(-1) + z.square() / (z.shape[-1] - 1)


@dataclass(frozen=True)
class RescaledSquareFormula(Formula):
    """(k·(z_c − M)² + Σ_{j≠c} z_j²) / K. Source: Hui & Belkin 2021, arXiv 2006.07322.

    The paper takes k = M = 1 up to 42 classes, and for more classes larger ones (ImageNet: k = 15, M = 30).
    """

    k: float = 1.0
    m: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("k", self.k), ("m", self.m)):
            if not 0 < value < float("inf"):
                raise ConfigError(
                    f"the rescaled square loss cannot have {name} = {value}",
                    expected=f"{name} > 0",
                    found=str(value),
                    fix="1 up to 42 classes, more for more",
                )

    def common(self, z: Tensor) -> Tensor:
        return z.square().sum(-1) / z.shape[-1]

    def score(self, z: Tensor) -> Tensor:
        k, m = self.k, self.m
        return ((1 - k) * z.square() + 2 * k * m * z - k * m * m) / z.shape[-1]

    def probabilities(self, z: Tensor) -> Tensor:
        """max(z / M, FLOOR_SHARE/K), divided by its sum: z is trained towards M in the target's place, 0 elsewhere."""
        return _normalized(z / self.m)


CROSS_ENTROPY = CrossEntropyFormula()


def _normalized(outputs: Tensor) -> Tensor:
    positive = outputs.clamp(min=FLOOR_SHARE / outputs.shape[-1])
    return positive / positive.sum(-1, keepdim=True)


def _check_alpha(name: str, alpha: float | None) -> None:
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ConfigError(f"{name} cannot have alpha = {alpha}", expected="alpha > 0", found=str(alpha))


def _check_limit(name: str, limit: float, highest: float) -> None:
    if not 0 < limit <= highest:
        raise ConfigError(
            f"{name} cannot be clamped at {limit}",
            expected=f"above 0, at most {highest:g}: float32 overflows beyond",
            found=str(limit),
        )
