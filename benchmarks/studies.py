"""What the studies of the thesis's claims share: rows of seeds, paired by seed, and what they amount to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import t

from benchmarks.rows import Row

StudyRow = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """Differences a − b over common seeds: their mean, half of its 95 % interval (Student's t), two-sided p."""

    num_pairs: int
    mean: float
    half_width: float
    p: float

    @property
    def above(self) -> bool:
        """a is larger, p < .05."""
        return self.mean > 0 and self.p < 0.05

    @property
    def below(self) -> bool:
        """a is smaller, p < .05."""
        return self.mean < 0 and self.p < 0.05


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """Compares by seed. Raises ValueError unless both hold the same seeds, at least two."""
    if a.keys() != b.keys() or len(a) < 2:
        raise ValueError(f"seeds {sorted(a)} cannot be paired with seeds {sorted(b)}")
    differences = [a[seed] - b[seed] for seed in sorted(a)]
    if not all(math.isfinite(one) for one in differences):
        return Paired(len(differences), math.nan, math.nan, 1.0)  # a run that diverged decides nothing
    mean, n = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Paired(n, mean, 0.0, 1.0 if mean == 0 else 0.0)
    p = 2 * float(t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, float(t.ppf(0.975, n - 1)) * error, p)


def seeds_of(rows: Iterable[StudyRow], case: str, system: str, metric: str) -> dict[int, float]:
    """The values by seed, NaN where a file has none, of rows whose case is "{case}, seed {number}"."""
    found: dict[int, float] = {}
    for row in rows:
        name, _, seed = row["case"].rpartition(", seed ")
        if (name, row["system"], row["metric"]) == (case, system, metric):
            found[int(seed)] = math.nan if row["value"] is None else float(row["value"])
    return found


def cases_of(rows: Iterable[StudyRow], prefix: str = "") -> list[str]:
    """Cases without their seeds, in the rows' order, once each."""
    names = (row["case"].rpartition(", seed ")[0] for row in rows)
    return list(dict.fromkeys(name for name in names if name.startswith(prefix) and name))


def systems_of(rows: Iterable[StudyRow], case: str) -> list[str]:
    """Systems that have rows of the case, in order."""
    return list(dict.fromkeys(row["system"] for row in rows if row["case"].rpartition(", seed ")[0] == case))


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What a RowFile writes, without the machine."""
    return [asdict(row) for row in rows]


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"; "none" of nothing."""
    if not names:
        return "none"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
