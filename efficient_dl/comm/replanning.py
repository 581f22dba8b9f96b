"""Whether a running training should follow a new plan: hysteresis, as a pure function of (state, measurements).

A switch costs a step or two, and links are noisy. So the new choice must win by `gain` over the present one, as both
are predicted from the new measurements, must do so `patience` times in a row, and `distance_steps` after the last
switch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import (
    Decision,
    PlannerOptions,
    Prediction,
    Shapes,
    plan_for,
    predict,
    wording,
)


@dataclass(frozen=True)
class PlanState:
    """What a run follows, as checkpoints keep it.

    bits, hierarchy, group_size: of the plan in force. rival: those that won last time. wins: how often in a row.
    since_step: the optimizer step after which the plan came into force.
    """

    bits: str
    hierarchy: bool
    rival: tuple[str, bool, int] | None = None
    wins: int = 0
    since_step: int = 0
    group_size: int = 0

    @property
    def plan(self) -> tuple[str, bool, int]:
        """What tells choices apart: bits, hierarchy, group_size."""
        return self.bits, self.hierarchy, self.group_size

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> PlanState:
        """Undoes `to_json`."""
        state, rival = PlanState(**values), values["rival"]
        return replace(
            state, rival=(rival[0], rival[1], rival[2] if len(rival) > 2 else 0) if rival else None
        )


@dataclass(frozen=True)
class Verdict:
    """decision: what to switch to, on all ranks at the same step; None: keep the plan. reason: of either."""

    state: PlanState
    decision: Decision | None
    reason: str


@dataclass(frozen=True)
class Hysteresis:
    """gain: by what share a step must become shorter. patience: how many measurements in a row must say so.

    distance_steps: between two switches, and between the start and the first one.
    """

    gain: float = 0.1
    patience: int = 2
    distance_steps: int = 100


def reconsider(
    state: PlanState,
    measurements: Measurements,
    model: Shapes,
    floor_bits: float,
    step: int,
    options: PlannerOptions | None = None,
    hysteresis: Hysteresis | None = None,
) -> Verdict:
    """Keeps the plan or switches, after an optimizer step; the same for the same arguments.

    A plan under the floor, or one that cannot be had any more, is left at once. One that compresses less and is at
    most as slow counts as a gain, too: it must win as often, but not by `gain`.
    """
    hysteresis, options = hysteresis or Hysteresis(), options or PlannerOptions()
    decision = plan_for(measurements, model, floor_bits, options)
    new = decision.plan
    calm = replace(state, rival=None, wins=0)
    switched = PlanState(new[0], new[1], since_step=step, group_size=new[2])
    if new == state.plan:
        return Verdict(calm, None, f"kept: {decision.reason}")
    present = _present(state, measurements, model, floor_bits, options)
    if present is None:
        left = f"{state.bits} bits cannot be chosen any more; {decision.reason}"
        return Verdict(switched, decision, f"switched: {left}")
    bits = [one.bits for one in decision.predictions]
    compresses_less = bits.index(decision.bits) < bits.index(present.bits)
    wanted = present.step_seconds * (1.0 if compresses_less else 1 - hysteresis.gain)
    if decision.chosen.step_seconds > wanted:
        return Verdict(calm, None, f"kept {wording(present)}: the gain is too small; {decision.reason}")
    wins = state.wins + 1 if state.rival == new else 1
    waiting = replace(calm, rival=new, wins=min(wins, hysteresis.patience))
    if wins < hysteresis.patience:
        won = f"{wording(decision.chosen)} has won {wins} of {hysteresis.patience} times"
        return Verdict(waiting, None, f"kept {wording(present)}: {won}")
    if step - state.since_step < hysteresis.distance_steps:
        recent = f"{wording(decision.chosen)} wins, but the plan is only {step - state.since_step} steps old"
        return Verdict(waiting, None, f"kept {wording(present)}: {recent}")
    return Verdict(switched, decision, f"switched from {wording(present)}: {decision.reason}")


def _present(
    state: PlanState, measurements: Measurements, model: Shapes, floor_bits: float, options: PlannerOptions
) -> Prediction | None:
    """What is predicted for the plan in force, also where the other reduction is faster; None if it cannot be had."""
    only = replace(
        options,
        flat=options.flat and not (state.hierarchy or state.group_size),
        hierarchy=options.hierarchy and state.hierarchy,
        groups=options.groups and state.group_size > 0,
        group_size=state.group_size,
    )
    found = predict(measurements, model, floor_bits, only)
    return next((one for one in found if one.plan == state.plan), None)
