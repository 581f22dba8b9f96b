"""What each rank reports at a stage's end, and how the reports of all become the scheduler's input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import RankFacts

ALIKE = 1.25  # ranks that take less than so many times as long as the next faster one count as equal to it,
ALIKE_IN_ALL = 1.5  # unless the fastest that counts so is so many times as fast
LINK_GRAIN = 0.25  # and bytes a second in proportion

_STATIC = (
    "name",
    "parameter_bytes",
    "output_bytes",
    "head_parameter_bytes",
)  # equal wherever they are measured


@dataclass(frozen=True)
class Report:
    """What one rank knows.

    names: of all partitions, in order; equal on all ranks.
    costs: by partition, those that this rank measured.
    losses: by partition, the smoothed local loss (a float) of the stage that ends, of those that this rank trained.
    memory_bytes: what this rank may use; None: unknown.
    speed: relative to the other ranks; None: found from the work of all ranks, else as it was before.
    work_seconds: for which this rank was busy with work that is the same on all ranks, which did it at the same time.
    bytes_per_second: of this rank's link, measured while all ranks used theirs; None: as it was before.
    """

    names: tuple[str, ...]
    costs: Mapping[int, PartitionCosts] = field(default_factory=dict[int, PartitionCosts])
    losses: Mapping[int, float] = field(default_factory=dict[int, float])
    memory_bytes: int | None = None
    speed: float | None = None
    bytes_per_second: float | None = None
    work_seconds: float | None = None

    def __post_init__(self) -> None:
        for index in [*self.costs, *self.losses]:
            if not 0 <= index < len(self.names):
                raise ValueError(f"there is no partition {index} among {len(self.names)}")
        for index, cost in self.costs.items():
            if cost.name != self.names[index]:
                raise ValueError(
                    f"the costs of {cost.name!r} are given for partition {index}, {self.names[index]!r}"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "costs": {str(index): asdict(cost) for index, cost in self.costs.items()},
            "losses": {str(index): loss for index, loss in self.losses.items()},
            "memory_bytes": self.memory_bytes,
            "speed": self.speed,
            "bytes_per_second": self.bytes_per_second,
            "work_seconds": self.work_seconds,
        }

    @staticmethod
    def from_json(names: Sequence[str], value: Mapping[str, Any]) -> Report:
        return Report(
            tuple(names),
            {int(index): PartitionCosts(**cost) for index, cost in value["costs"].items()},
            {int(index): loss for index, loss in value["losses"].items()},
            value["memory_bytes"],
            value["speed"],
            value["bytes_per_second"],
            value["work_seconds"],
        )


def static_facts(report: Report) -> dict[str, Any]:
    """What must not differ between ranks that measured the same partition."""
    return {
        f"costs.{index}.{key}": getattr(cost, key)
        for index, cost in sorted(report.costs.items())
        for key in _STATIC
    }


def merged_ranks(
    reports: Sequence[Report], before: Sequence[float], links: Sequence[float | None] = ()
) -> list[RankFacts]:
    """The ranks. before, links: their speeds and links as last known; those of another number of ranks do not count."""
    known = list(before) if len(before) == len(reports) else [1.0] * len(reports)
    works = [report.work_seconds for report in reports if report.work_seconds is not None]
    if len(works) == len(reports):
        known = _speeds(works)
    lines = list(links) if len(links) == len(reports) else [None] * len(reports)
    return [
        RankFacts(
            report.memory_bytes,
            report.speed if report.speed is not None else speed,
            _rounded(report.bytes_per_second) if report.bytes_per_second is not None else line,
        )
        for report, speed, line in zip(reports, known, lines, strict=True)
    ]


def _speeds(works: Sequence[float]) -> list[float]:
    """Relative to the median one, of ranks that took so many seconds for the same work; alike ones are equal."""
    order = sorted(range(len(works)), key=lambda rank: works[rank])
    classes: list[list[int]] = []
    for rank in order:
        near = classes and works[rank] < ALIKE * works[classes[-1][-1]]
        if near and works[rank] < ALIKE_IN_ALL * works[classes[-1][0]]:
            classes[-1].append(rank)
        else:
            classes.append([rank])
    typical = {rank: median(works[one] for one in alike) for alike in classes for rank in alike}
    middle = typical[order[len(order) // 2]]
    return [float(f"{middle / typical[rank]:.2g}") for rank in range(len(works))]


def _rounded(rate: float) -> float:
    """To powers of 1 + LINK_GRAIN, so that links that are alike count as equal."""
    return float(f"{(1 + LINK_GRAIN) ** round(math.log(rate, 1 + LINK_GRAIN)):.3g}")


def merged_costs(
    reports: Sequence[Report], ranks: Sequence[RankFacts], before: Sequence[PartitionCosts]
) -> list[PartitionCosts]:
    """The costs, on a rank of speed 1: medians of seconds and the most bytes over the ranks that measured a partition.

    before: as last known, for partitions that no rank measured this time.
    """
    merged = list(before)
    for index in range(len(merged)):
        found = [
            (report.costs[index], facts.speed)
            for report, facts in zip(reports, ranks, strict=True)
            if index in report.costs
        ]
        if found:
            merged[index] = replace(
                found[0][0],
                forward_seconds=median(cost.forward_seconds * speed for cost, speed in found),
                backward_seconds=median(cost.backward_seconds * speed for cost, speed in found),
                head_seconds=median(cost.head_seconds * speed for cost, speed in found),
                activation_bytes=max(cost.activation_bytes for cost, _ in found),
                head_activation_bytes=max(cost.head_activation_bytes for cost, _ in found),
                again_bytes=max(cost.again_bytes for cost, _ in found),
            )
    return merged


def merged_losses(reports: Sequence[Report], num_partitions: int) -> list[float | None]:
    """By partition: the mean over the ranks that trained it; None if none did."""
    found = [
        [report.losses[index] for report in reports if index in report.losses]
        for index in range(num_partitions)
    ]
    return [fmean(losses) if losses else None for losses in found]
