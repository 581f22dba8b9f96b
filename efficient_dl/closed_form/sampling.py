"""Weights of features that are drawn, not fitted: at random, or from pairs of rows (SWIM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.closed_form.network import Features, make_activation
from efficient_dl.closed_form.ranks import Ranks
from efficient_dl.config import suggestion
from efficient_dl.errors import ConfigError, DataError

KINDS = ("random", "swim")
SWIM_CONSTANT = (
    0.5  # c: the pair's two rows are at −c and c of the activation; as in RFRBoost's published runs
)
CANDIDATES_PER_ROW = 5  # likewise
MAX_CANDIDATES = 100_000


@dataclass(frozen=True)
class Sampler:
    """Draws features from one generator; of several ranks, rank 0's are taken by all."""

    kind: str
    activation: str
    generator: torch.Generator
    ranks: Ranks

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            fix = suggestion(self.kind, list(KINDS))
            raise ConfigError(f"there are no features {self.kind!r}", expected=" or ".join(KINDS), fix=fix)
        make_activation(self.activation)

    def features(self, x: Tensor, targets: Tensor, width: int) -> Features:
        """x: (rows, d) of this rank; targets: (rows, c). SWIM looks at rank 0's rows only.

        Raises on all ranks where rank 0 has no pairs: its own error there, PlanMismatch elsewhere.
        """
        if self.kind == "random":
            weight, bias = self._random(x.shape[1], width)
        else:
            drawn, failure = torch.zeros(width, x.shape[1] + 1).double(), None
            if self.ranks.rank == 0:
                try:
                    drawn = self._swim(x, targets, width)
                except Exception as error:  # the others wait: they must hear of it
                    failure = error
            self.ranks.agree({}, failure)
            drawn = self.ranks.first(drawn)
            weight, bias = drawn[:, :-1].contiguous(), drawn[:, -1].contiguous()
        return Features(weight, bias, self.activation)

    def _random(self, inputs: int, width: int) -> tuple[Tensor, Tensor]:
        """Weights N(0, 1/d), biases N(0, 1/√d): as in RFRBoost's published runs."""
        values = torch.randn(width, inputs + 1, generator=self.generator, dtype=torch.float64)
        return values[:, :-1] * inputs**-0.5, values[:, -1] * inputs**-0.25

    def _swim(self, x: Tensor, targets: Tensor, width: int) -> Tensor:
        """Pairs (x₁, x₂) drawn ∝ ‖Δy‖/‖Δx‖; w = 2c Δx/‖Δx‖², b = −w·x₁ − c: (width, d + 1), b last.

        Where targets do not differ, all pairs of one process's rows tell as much; of several ranks' that is an error,
        as others' rows may tell more. Source: Bolager et al. 2023 (arXiv 2306.16830).
        """
        rows = len(x)
        number = min(CANDIDATES_PER_ROW * max(rows, width), MAX_CANDIDATES)
        one = torch.randint(rows, (number,), generator=self.generator)
        other = (one + 1 + torch.randint(rows - 1, (number,), generator=self.generator)) % rows
        squared = (x[other] - x[one]).square().sum(1)
        apart = squared > 0
        slopes = (targets[other] - targets[one]).norm(dim=1) / squared.clamp(min=1e-300).sqrt()
        chances = torch.where(apart, slopes, 0.0)
        if not bool(chances.any()) and self.ranks.world_size > 1 and bool(apart.any()):
            raise DataError(
                "SWIM draws pairs of rank 0's rows, and their targets are all alike",
                expected="targets that differ on rank 0",
                found=f"{rows} rows with equal ones",
                fix="shuffle rows over ranks, or features='random'",
            )
        if not bool(chances.any()):
            chances = apart.double()
        if not bool(chances.any()):
            raise ConfigError(
                "SWIM needs rows that differ", found=f"{rows} equal ones", fix="features='random'"
            )
        chosen = torch.multinomial(chances / chances.max(), width, replacement=True, generator=self.generator)
        one, other = one[chosen], other[chosen]
        weight = 2 * SWIM_CONSTANT * (x[other] - x[one]) / squared[chosen][:, None]
        bias = -(weight * x[one]).sum(1) - SWIM_CONSTANT
        return torch.cat([weight, bias[:, None]], dim=1)
