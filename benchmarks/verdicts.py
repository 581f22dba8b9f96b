"""What rows say of a claim: the three forms of a verdict, and rows of a study joined by seed.

A study is a module with `run_study(*, quick) -> rows`, `verdict(rows) -> str`, a pure function, and where it has more
to show than the default picture `draw(rows, path)`. Rows are dicts as benchmarks.rows writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.pairs import mean_interval

HOLDS, HOLDS_IF, FAILS = "holds", "holds if", "does not hold here"
IN_PART = "holds in part"
Rows = Sequence[Mapping[str, Any]]


def says(conditions: Sequence[str] | None, found: str) -> str:
    """A verdict: under which conditions the claim holds (none: always; None: under none), and the numbers."""
    if conditions is None:
        return f"{FAILS}: {found}"
    return f"{HOLDS_IF} {', and '.join(conditions)}: {found}" if conditions else f"{HOLDS}: {found}"


def form_of(verdict: str) -> str:
    """Which form it has: one of the three, IN_PART for a text of several findings that differ, "" for none."""
    forms = [form for form in (FAILS, HOLDS_IF, HOLDS) if verdict.startswith(form)]
    if forms:
        return forms[0]
    holds = HOLDS in verdict.replace(FAILS, "")
    return (IN_PART if holds else FAILS) if FAILS in verdict else HOLDS if holds else ""


def split(verdict: str) -> tuple[str, str]:
    """(what is said, the numbers that say it); a text of other shape is the numbers, and its form what is said."""
    said, colon, found = verdict.partition(": ")
    if said.startswith((FAILS, HOLDS)):
        return said, found
    return form_of(verdict) or "no verdict", found if colon and " " not in said else verdict


def by_seed(rows: Rows, system: str, metric: str) -> dict[str, dict[int, float]]:
    """{case: {seed: value}} of one metric of one system; of a repeated row the later one; NaN if not finite."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        case, comma, seed = str(row["case"]).rpartition(", seed ")
        if comma and (row["system"], row["metric"]) == (system, metric):
            found.setdefault(case, {})[int(seed)] = math.nan if row["value"] is None else float(row["value"])
    return found


def systems(rows: Rows) -> list[str]:
    """The systems in the rows, in their order."""
    return list(dict.fromkeys(str(row["system"]) for row in rows))


def differences(values: Mapping[int, float], reference: Mapping[int, float]) -> tuple[float, float, int]:
    """(mean, half width of the 95 % interval, pairs) of values − reference over the seeds that both have.

    With a run that gave no finite number mean and half width are infinite; NaN without pairs.
    """
    pairs = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not pairs:
        return math.nan, math.nan, 0
    if not all(math.isfinite(one) for one in pairs):
        return math.inf, math.inf, len(pairs)
    return (*mean_interval(pairs), len(pairs))


def span(values: Iterable[float], form: str = ".1f") -> str:
    """The smallest and the largest: "3.1 to 4.0", or one number where they are alike."""
    known = sorted(values)
    low, high = format(known[0], form), format(known[-1], form)
    return low if low == high else f"{low} to {high}"


def interval_text(mean: float, half_width: float, form: str = "+.1f") -> str:
    """ "+1.2 ± 0.3", without the half where one pair has none."""
    if not math.isfinite(mean):
        return "diverged"
    return (
        format(mean, form) + f" ± {format(half_width, form.lstrip('+'))}"
        if math.isfinite(half_width)
        else format(mean, form)
    )
