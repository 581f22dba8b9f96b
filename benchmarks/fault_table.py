"""The table of fault x launcher that `python -m benchmarks.faults --table` makes from measured rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fault_cases import LAUNCHERS, Case

BEGIN = "<!-- begin: python -m benchmarks.faults --table -->"
END = "<!-- end -->"
_HEAD = "| fault | launcher | promised | seen | seconds to recover | lost steps | weights at the end |"
_SHORT_HEAD = "| fault | torchrun | Slurm | mpirun |"
_NOTHING = "—"


@dataclass
class Seen:
    """The newest rows of one fault under one launcher. behaviour: in words. values: by metric."""

    behaviour: str
    values: dict[str, float] = field(default_factory=dict)
    load: float | None = None

    @property
    def recovery(self) -> str:
        """Seconds, "ends after" where the job ended first or for good."""
        again, end = self.values.get("seconds_to_recover"), self.values.get("seconds_to_end")
        if again is None:
            return "" if end is None else f"ends after {end:.1f}"
        return f"{again:.1f}" if end is None else f"{again:.1f} (ends after {end:.1f})"

    @property
    def lost(self) -> str:
        """Steps that were trained twice."""
        return f"{self.values['lost_steps']:.0f}" if "lost_steps" in self.values else ""


def read(path: Path) -> dict[tuple[str, str], Seen]:
    """By launcher and fault, what the newest rows of a file say."""
    found: dict[tuple[str, str], Seen] = {}
    for line in path.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        title, _, behaviour = row["case"].partition(": ")
        key = (row["system"], title)
        if key not in found or row["metric"] in found[key].values:  # a new measurement of the same
            found[key] = Seen(behaviour, load=row["env"].get("load"))
        found[key].values[row["metric"]] = row["value"]
    return found


def table(seen: dict[tuple[str, str], Seen], launchers: Iterable[str] = tuple(LAUNCHERS)) -> str:
    """Every case that was measured, in Markdown."""
    lines = [_HEAD, "|---" * 7 + "|"]
    for launcher in launchers:
        for case in LAUNCHERS[launcher][1].values():
            one = seen.get((launcher, case.title))
            if one is not None:
                cells = [case.title, launcher, case.promise, one.behaviour, one.recovery, one.lost]
                lines.append(f"| {' | '.join([*cells, _weights(case, one)])} |")
    return "\n".join(lines)


def short_table(seen: dict[tuple[str, str], Seen]) -> str:
    """Fault x launcher -> seconds to recover and lost steps, in Markdown: the faults that several launchers have."""
    known = Counter(case.title for _, cases in LAUNCHERS.values() for case in cases.values())
    titles = [title for title, launchers in known.items() if launchers > 1]
    lines = [_SHORT_HEAD, "|---|---|---|---|"]
    for title in titles:
        cells = [_short(seen.get((launcher, title))) for launcher in LAUNCHERS]
        if set(cells) != {_NOTHING}:
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def place(text: str, content: str) -> str:
    """A Markdown text with the content between its two marks. Raises ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text has no {BEGIN} with {END} after it")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _short(one: Seen | None) -> str:
    if one is None:
        return _NOTHING
    again, end = one.values.get("seconds_to_recover"), one.values.get("seconds_to_end")
    if again is None:
        stays = "goes on" if "same_weights" in one.values else "ends"
        return stays if end is None else f"{stays}, {end:.0f} s"
    return f"{again:.0f} s, {one.lost}" + ("" if end is None else " *")


def _weights(case: Case, one: Seen) -> str:
    if "same_weights" not in one.values:
        return "no end"
    if one.values["same_weights"]:
        return "bit for bit"
    return "NOT THE SAME" if case.is_exact else "one worker instead of two"
