"""Which partition trains where: a pure scheduler, and the thin shell that runs it for all ranks.

`schedule` is a pure function of measured costs, ranks, progress and options; its `Decision` says why. `Coordinator`
gathers reports over torch's store, lets rank 0 decide, and every rank verify; its `history` is what was decided so
far, and `timeline` draws it. docs/coordinator.md explains how decisions are made.
"""

from efficient_dl.coordinator.assignment import Assignment, Decision
from efficient_dl.coordinator.coordinator import Coordinator
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import Kind, PartitionState, RankFacts, ScheduleOptions
from efficient_dl.coordinator.history import Entry, History
from efficient_dl.coordinator.plateau import PlateauRule, smoothed
from efficient_dl.coordinator.report import Report
from efficient_dl.coordinator.scheduler import schedule

__all__ = [
    "Assignment",
    "Coordinator",
    "Decision",
    "Entry",
    "History",
    "Kind",
    "PartitionCosts",
    "PartitionState",
    "PlateauRule",
    "RankFacts",
    "Report",
    "ScheduleOptions",
    "schedule",
    "smoothed",
]
