"""Whether a compressor's saved state fits the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from efficient_dl.comm.plan import Plan
from efficient_dl.errors import CheckpointError, PlanMismatch

STATE_VERSION = 3


def check_state(state: Mapping[str, Any], plan: Plan, names: Iterable[str]) -> None:
    """Raises CheckpointError for another version or model, PlanMismatch for another plan.

    state: `Compressor.state_dict`. names: of the run's parameters.
    """
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(
            "the compression state is of another version",
            expected=str(STATE_VERSION),
            found=str(state.get("version")),
        )
    saved, own = {"messages": "exact", **state["plan"]}, plan.facts()
    differing = [key for key in own if saved.get(key) != own[key]]
    if differing:
        raise PlanMismatch(
            "the checkpoint was written under another plan",
            differs="; ".join(
                f"{key} = {saved.get(key)} (checkpoint), {own[key]} (run)" for key in differing
            ),
            fix="resume with the settings the run was started with, or leave the compression state out",
        )
    unknown = sorted(set(state["meter"]["parameters"]) ^ set(names))
    if unknown:
        raise CheckpointError(
            "the compression state belongs to another model",
            differs=f"parameter {unknown[0]!r} (and {len(unknown) - 1} more) is in only one of the two",
        )


def check_nothing_waits(states: Sequence[Mapping[str, Any]]) -> None:
    """Raises PlanMismatch where something waits to be sent: for a run that would not take it along."""
    waiting = [name for state in states if state["residuals"] for name in state["residuals"]["parameters"]]
    if waiting:
        raise PlanMismatch(
            "the checkpoint holds what packets have left out, and this run would drop it",
            found=f"residuals of {waiting[0]!r} (and {len(waiting) - 1} more), error_feedback=False",
            fix="error_feedback=True, as in the run that was saved, or leave the compression state out",
        )
