"""Whether a running training should follow a new plan: hysteresis, as a pure function of (state, measurements).

A switch costs residuals and rates, and links are noisy. So the new choice must win by `gain` over the present one, as
both are predicted from the new measurements, and must do so `patience` times in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, PlannerOptions, Prediction, Shapes, plan_for, wording


@dataclass(frozen=True)
class PlanState:
    """What a run follows, as checkpoints keep it.

    bits, hierarchy: of the plan in force. rival: (bits, hierarchy) that won last time. wins: how often in a row.
    """

    bits: str
    hierarchy: bool
    rival: tuple[str, bool] | None = None
    wins: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"bits": self.bits, "hierarchy": self.hierarchy, "rival": self.rival, "wins": self.wins}

    @staticmethod
    def from_json(values: dict[str, Any]) -> PlanState:
        """Undoes `to_json`."""
        rival = values["rival"]
        return PlanState(values["bits"], values["hierarchy"], rival and (rival[0], rival[1]), values["wins"])


@dataclass(frozen=True)
class Verdict:
    """decision: what to switch to, on all ranks at the same step; None: keep the plan. reason: of either."""

    state: PlanState
    decision: Decision | None
    reason: str


@dataclass(frozen=True)
class Hysteresis:
    """gain: by what share a step must become shorter. patience: how many measurements in a row must say so."""

    gain: float = 0.1
    patience: int = 2


def reconsider(
    state: PlanState,
    measurements: Measurements,
    model: Shapes,
    floor_bits: float,
    options: PlannerOptions | None = None,
    hysteresis: Hysteresis | None = None,
) -> Verdict:
    """Keeps the plan or switches; the same for the same arguments.

    A plan under the floor, or one that cannot be had any more, is left at once. One that compresses less and is at
    most as slow counts as a gain, too: it must win as often, but not by `gain`.
    """
    hysteresis = hysteresis or Hysteresis()
    decision = plan_for(measurements, model, floor_bits, options)
    new = (decision.bits, decision.hierarchy)
    calm = PlanState(state.bits, state.hierarchy)
    if new == (state.bits, state.hierarchy):
        return Verdict(calm, None, f"kept: {decision.reason}")
    present = next((one for one in decision.predictions if _is(one, state)), None)
    if present is None:
        left = f"{state.bits} bits cannot be chosen any more; {decision.reason}"
        return Verdict(PlanState(*new), decision, f"switched: {left}")
    order = decision.predictions
    compresses_less = order.index(decision.chosen) < order.index(present)
    wanted = present.step_seconds * (1.0 if compresses_less else 1 - hysteresis.gain)
    if decision.chosen.step_seconds > wanted:
        return Verdict(calm, None, f"kept {wording(present)}: the gain is too small; {decision.reason}")
    wins = state.wins + 1 if state.rival == new else 1
    if wins < hysteresis.patience:
        waiting = replace(calm, rival=new, wins=wins)
        return Verdict(
            waiting,
            None,
            f"kept {wording(present)}: {wording(decision.chosen)} has won {wins} of {hysteresis.patience} times",
        )
    return Verdict(PlanState(*new), decision, f"switched from {wording(present)}: {decision.reason}")


def _is(one: Prediction, state: PlanState) -> bool:
    return (one.bits, one.hierarchy) == (state.bits, state.hierarchy)
