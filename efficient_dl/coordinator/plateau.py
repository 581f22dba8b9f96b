"""When a local loss has converged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from efficient_dl.errors import ConfigError

TRIMMED_SHARE = 0.1  # of a stage's losses, at each end: a spike or two do not move the rest


@dataclass(frozen=True)
class PlateauRule:
    """A loss stands still if it changes by less than `threshold` a stage, over the last patience + 1 stages.

    The change is the median of the slopes between all pairs of these stages, relative to their median loss: one stage
    that is out of line, whichever way, decides nothing. A loss that rises faster than the threshold, or is not
    finite, has not converged.

    in_order: a partition is frozen only after those before it; as long as they change, so does what it is given,
    and a frozen one could not follow.

    Source: Theil 1950, Sen 1968 (the slope); Brock et al. 2017, FreezeOut (the order).
    """

    threshold: float = 0.005
    patience: int = 3
    in_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ConfigError(
                "the plateau's threshold is out of range",
                expected="0 < threshold < 1",
                found=str(self.threshold),
            )
        if self.patience < 1:
            raise ConfigError(
                "the plateau's patience is out of range", expected="at least 1", found=str(self.patience)
            )

    def improvement(self, losses: Sequence[float]) -> float | None:
        """By what share the loss falls a stage; None as long as there are too few stages to tell."""
        recent = losses[-self.patience - 1 :]
        if len(recent) <= self.patience or not all(map(math.isfinite, recent)):
            return None
        slope = median((recent[j] - recent[i]) / (j - i) for i, j in combinations(range(len(recent)), 2))
        level = abs(median(recent))
        if level == 0.0:
            return 0.0 if slope == 0.0 else math.copysign(math.inf, -slope)
        return -slope / level

    def converged(self, losses: Sequence[float]) -> bool:
        """losses: smoothed, of each stage, oldest first."""
        improvement = self.improvement(losses)
        return improvement is not None and abs(improvement) < self.threshold


def smoothed(losses: Sequence[float]) -> float:
    """The mean of a stage's losses without the highest and the lowest tenth; NaN if there is none or one not finite."""
    if not losses or not all(map(math.isfinite, losses)):
        return math.nan
    trimmed = int(len(losses) * TRIMMED_SHARE)
    return fmean(sorted(losses)[trimmed : len(losses) - trimmed])
