"""Which partitions train on, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from efficient_dl.coordinator.facts import PartitionState, ScheduleOptions
from efficient_dl.coordinator.plateau import PlateauRule


@dataclass(frozen=True)
class Ended:
    """A partition that has trained to its end. why: for people.

    new: it was not frozen before. for_good: also if the run is given more steps later.
    """

    index: int
    why: str
    new: bool
    for_good: bool


def ended_partitions(states: Sequence[PartitionState], options: ScheduleOptions) -> dict[int, Ended]:
    """By index: those frozen before, those that reached their budget, and those whose loss stands still."""
    ended: dict[int, Ended] = {}
    for index, state in enumerate(states):
        budget = options.budget(index, len(states))
        rule = options.plateau
        if state.frozen:
            ended[index] = Ended(index, f"frozen after {state.steps} steps", False, True)
        elif state.steps >= budget:
            ended[index] = Ended(
                index, f"trained its budget of {budget} steps", True, options.kind == "sequential"
            )
        elif rule is not None and rule.converged(state.losses) and _in_turn(index, ended, rule):
            ended[index] = Ended(index, _standing_still(state, rule), True, True)
    return ended


def waiting_notes(
    states: Sequence[PartitionState], ended: dict[int, Ended], options: ScheduleOptions, names: list[str]
) -> list[str]:
    """Sentences on partitions that train on although one might think otherwise."""
    notes: list[str] = []
    for index, state in enumerate(states):
        rule = options.plateau
        if index in ended or rule is None or not state.losses:
            continue
        if not math.isfinite(state.losses[-1]):
            notes.append(f"The local loss of {names[index]} is not finite; this is no convergence.")
        elif rule.converged(state.losses):
            before = next(other for other in range(index) if other not in ended)
            notes.append(
                f"The loss of {names[index]} stands still too, but {names[before]} still changes what it gets."
            )
    return notes


def _in_turn(index: int, ended: dict[int, Ended], rule: PlateauRule) -> bool:
    return not rule.in_order or all(before in ended for before in range(index))


def _standing_still(state: PartitionState, rule: PlateauRule) -> str:
    improvement = rule.improvement(state.losses)
    assert improvement is not None
    return (
        f"its loss {state.losses[-1]:.4g} changed by {abs(improvement):.2%} a stage over the last"
        f" {rule.patience + 1} stages, less than {rule.threshold:.2%}"
    )
