"""Weights of features that are drawn, not fitted: at random, from pairs of rows (SWIM), or on fields of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from efficient_dl.closed_form.network import Features, deviation, make_activation
from efficient_dl.closed_form.ranks import Ranks
from efficient_dl.config import suggestion
from efficient_dl.errors import ConfigError, DataError

KINDS = ("random", "swim", "fields")
SWIM_CONSTANT = (
    0.5  # c: the pair's two rows are at −c and c of the activation; as in RFRBoost's published runs
)
CANDIDATES_PER_ROW = 5  # likewise
MAX_CANDIDATES = 100_000
FIELD_SIDES = (3, 8)  # of a field, pixels, at least and at most
FIELD_ROWS = 4096  # that the spread of a field's values is taken from


@dataclass(frozen=True)
class Sampler:
    """Draws features from one generator; of several ranks, rank 0's are taken by all.

    image_shape: of a row, (height, width) or (channels, height, width), for the kind "fields" alone.
    """

    kind: str
    activation: str
    generator: torch.Generator
    ranks: Ranks
    image_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            fix = suggestion(self.kind, list(KINDS))
            raise ConfigError(f"there are no features {self.kind!r}", expected=" or ".join(KINDS), fix=fix)
        make_activation(self.activation)
        if (self.kind == "fields") != (self.image_shape is not None):
            raise ConfigError(
                "fields are parts of an image, whose shape must be known, and other features have none",
                expected="features='fields' and image_shape=(height, width), or neither",
                found=f"features={self.kind!r}, image_shape={self.image_shape!r}",
            )
        if self.image_shape is not None:
            _check_shape(self.image_shape)

    def of_hidden(self) -> Sampler:
        """For values that are no image."""
        return replace(self, kind="random", image_shape=None) if self.kind == "fields" else self

    def features(self, x: Tensor, targets: Tensor, width: int) -> Features:
        """x: (rows, d) of this rank; targets: (rows, c). SWIM and fields look at rank 0's rows only.

        Raises on all ranks where rank 0 cannot draw: its own error there, PlanMismatch elsewhere.
        """
        if self.kind == "random":
            weight, bias = self._random(x.shape[1], width)
        else:
            drawn, failure = torch.zeros(width, x.shape[1] + 1).double(), None
            if self.ranks.rank == 0:
                try:
                    drawn = self._fields(x, width) if self.kind == "fields" else self._swim(x, targets, width)
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

    def _fields(self, x: Tensor, width: int) -> Tensor:
        """Normal weights on a rectangle each, zero elsewhere, of variance 1 over rows; b: 0 at one of the rows.

        (width, d + 1), b last. Source: receptive fields after McDonnell et al. 2015 (arXiv 1412.8307); biases ours.
        """
        assert self.image_shape is not None
        *channels, high, wide = self.image_shape
        if math.prod(self.image_shape) != x.shape[1]:
            raise ConfigError(
                "the rows are not images of this shape",
                expected=f"{math.prod(self.image_shape)} columns, of image_shape {self.image_shape}",
                found=f"{x.shape[1]} columns",
            )

        def spans(side: int) -> Tensor:
            """(width, side): True from a random start on, for a random length."""
            low, most = (min(one, side) for one in FIELD_SIDES)
            lengths = torch.randint(low, most + 1, (width, 1), generator=self.generator)
            chance = torch.rand(width, 1, generator=self.generator, dtype=torch.float64)
            starts = (chance * (side - lengths + 1)).long()
            places = torch.arange(side)
            return (places >= starts) & (places < starts + lengths)

        inside = spans(high)[:, None, :, None] & spans(wide)[:, None, None, :]
        inside = inside.expand(width, math.prod(channels), high, wide).reshape(width, -1)
        weight = torch.randn(width, x.shape[1], generator=self.generator, dtype=torch.float64) * inside
        weight /= deviation((x[:FIELD_ROWS] @ weight.T).var(0, correction=0))[:, None]
        rows = torch.randint(len(x), (width,), generator=self.generator)
        bias = -(weight * x[rows]).sum(1)
        return torch.cat([weight, bias[:, None]], dim=1)

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


def _check_shape(shape: object) -> None:
    sides = shape if isinstance(shape, tuple) else ()
    if len(sides) not in (2, 3) or not all(isinstance(one, int) and one > 0 for one in sides):
        raise ConfigError(
            f"image_shape cannot be {shape!r}", expected="(height, width) or (channels, height, width)"
        )
