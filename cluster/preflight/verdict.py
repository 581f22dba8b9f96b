"""What is wrong with a job's hosts, given what all ranks have found: pure, so that every case can be tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_FIXES = {
    "python": "start every rank from one environment",
    "torch": "install one torch on all hosts, or one environment that they share",
    "numpy": "install one version on all hosts",
    "efficient_dl": "install one version on all hosts",
    "efficient_dl's code": "bring all hosts to the same checkout",
    "slurm": "one minor version of Slurm on all nodes",
    "munge": "one version of munge on all nodes",
    "locked memory": "set `ulimit -l` alike; under Slurm, PropagateResourceLimitsExcept=MEMLOCK",
    "open files": "set `ulimit -n` alike",
}


@dataclass(frozen=True)
class Report:
    """What a rank has found. address: its interface's. facts: what must be equal. problems: of its own."""

    rank: int
    host: str
    address: str
    facts: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def name(self) -> str:
        """As a person finds it."""
        return f"rank {self.rank} on {self.host} ({self.address})"


def problems_of(
    reports: Sequence[Report],
    world_size: int,
    offsets: Mapping[int, tuple[float, float]],
    max_skew_seconds: float,
) -> list[str]:
    """A line for each thing that is wrong; nothing if the job may start.

    offsets: seconds by which each rank's clock is ahead of rank 0's, and how wrong that may be.
    """
    come = {report.rank for report in reports}
    missing = sorted(set(range(world_size)) - come)
    problems = [f"{_listed(missing)} did not come, or went silent: see their own messages"] if missing else []
    problems += _differences(reports)
    problems += [f"{report.name}: {problem}" for report in reports for problem in report.problems]
    for report in reports:
        offset, error = offsets.get(report.rank, (0.0, 0.0))
        if abs(offset) - error > max_skew_seconds:
            way = "ahead of" if offset > 0 else "behind"
            problems.append(
                f"{report.name}: its clock is {abs(offset):.1f} s {way} rank 0's; run chrony or ntp on all hosts"
            )
    return problems


def _differences(reports: Sequence[Report]) -> list[str]:
    problems = []
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        values = {report.rank: report.facts.get(name, "not told") for report in reports}
        counts = Counter(values.values()).most_common()
        if len(counts) == 1:
            continue
        common, number = counts[0]
        fix = _FIXES.get(name, "make it the same on all hosts")
        for report in reports:
            if values[report.rank] != common:
                problems.append(
                    f"{report.name}: {name} is {values[report.rank]}, but {common} on "
                    f"{number} of {len(reports)} ranks; {fix}"
                )
    return problems


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
