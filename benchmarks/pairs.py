"""Paired differences: the same seeds with and without, joined by seed, with Student's interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t


@dataclass(frozen=True)
class Difference:
    """Relative differences (system − reference) / reference over common seeds, as fractions.

    half_width: of the mean's 95 % interval (Student's t, n − 1 degrees of freedom); NaN for one pair.
    failed: seeds where a run gave no finite loss. With any of them mean and half_width are infinite: a run that
    diverges is not left out of an average.
    """

    num_pairs: int
    mean: float
    half_width: float
    failed: tuple[int, ...]

    @property
    def upper95(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


def paired_difference(losses: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """Compares losses by seed. Raises ValueError unless both hold the same seeds, at least one."""
    if losses.keys() != reference.keys() or not losses:
        raise ValueError(f"seeds {sorted(losses)} cannot be paired with seeds {sorted(reference)}")
    failed = tuple(
        s for s in sorted(losses) if not math.isfinite(losses[s]) or not math.isfinite(reference[s])
    )
    if failed:
        return Difference(len(losses), math.inf, math.inf, failed)
    differences = [(losses[seed] - reference[seed]) / reference[seed] for seed in sorted(losses)]
    mean, half_width = mean_interval(differences)
    return Difference(len(differences), mean, half_width, ())


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95 % interval (Student's t); NaN for one value. Not of an empty sequence."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error
