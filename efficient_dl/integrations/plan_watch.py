"""Re-planning while a model trains, of one thing that is planned: windows, what looks may cost, what was decided."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from efficient_dl.comm import Meter
from efficient_dl.comm.alarm import median_seconds_a_byte
from efficient_dl.comm.look import LOOK_NUMEL, Allowance, Window
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, Shapes
from efficient_dl.comm.replanning import Hysteresis, PlanState, reconsider
from efficient_dl.comm.sampling import Spread
from efficient_dl.integrations.auto import AutoOptions, is_under_floor

_log = logging.getLogger(__name__)
_FEWEST_STEPS, _MOST_STEPS = 10, 1000  # of a window whose median is worth a comparison
_NANO = 1_000_000_000


@dataclass(frozen=True)
class ChosenPlan:
    """A plan that came into force after an optimizer step, 0: the run's first one.

    bits: as `compress` takes it. bounded: whether messages' sizes follow from it.
    """

    step: int
    bits: str
    hierarchy: bool
    reason: str
    group_size: int = 0
    bounded: bool = False

    @property
    def label(self) -> str:
        """A short name; the same plan has the same one at other steps."""
        if self.group_size:
            return f"{self.bits}, in groups of {self.group_size}"
        return f"{self.bits}, between nodes" if self.hierarchy else self.bits

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def of(decision: Decision, step: int, reason: str) -> ChosenPlan:
        """What was decided, to come into force after a step."""
        return ChosenPlan(
            step, decision.bits, decision.hierarchy, reason, decision.group_size, decision.bounded
        )

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> ChosenPlan:
        """Undoes `to_json`; further keys are ignored."""
        size, bounded = values.get("group_size", 0), values.get("bounded", False)
        return ChosenPlan(
            values["step"], values["bits"], values["hierarchy"], values["reason"], size, bounded
        )


@dataclass(frozen=True)
class ReplanOptions:
    """How often and how easily a run changes its plan; equal on all ranks. active: whether it does by itself."""

    active: bool = True
    hysteresis: Hysteresis = field(default_factory=Hysteresis)
    allowance: Allowance = field(default_factory=Allowance)


class Sample:
    """Values from all over a step's gradients, at most `LOOK_NUMEL`, for the look after it.

    Before they were reduced, where our hook sees them; under DDP's native all-reduce their averages.

    numel: of all gradients of a step that have one dtype, the one that comes first.
    """

    def __init__(self, numel: int) -> None:
        self._spread = Spread(numel, LOOK_NUMEL)
        self._parts: list[Tensor] = []

    def keep(self, x: Tensor, numels: Sequence[int]) -> None:
        """Copies a share of x, 1-D, of parameters with these numels; only of the dtype that comes first."""
        if self._parts and self._parts[0].dtype != x.dtype:
            return
        for part in x.detach().split(list(numels)):
            if (taken := self._spread.take(part)) is not None:
                self._parts.append(taken)

    def taken(self) -> tuple[Tensor | None, list[int]]:
        """The values, 1-D, and their parameters' numels; None without any, or where one is not finite."""
        values = torch.cat(self._parts) if self._parts else None
        if values is not None and not bool(torch.isfinite(values).all()):
            values = None  # codecs make flags of such blocks
        return values, [part.numel() for part in self._parts]

    def forget(self) -> None:
        """The sample was of a step that is over."""
        self._parts.clear()
        self._spread.begin()


class Place(Protocol):
    """Where a plan's links and codecs can be looked at again; all ranks call either method together."""

    def look(self, known: Measurements) -> Measurements:
        """`known` with what is found now, the same on all ranks. Raises TransportError if a rank is gone."""
        ...

    def slowest(self, seconds: float) -> float:
        """The largest of all ranks' seconds."""
        ...


class PlanWatch:
    """Watches a run's own counts, looks at links and codecs now and then, and decides, on all ranks the same.

    All that decides is gathered from all ranks first, and what follows is integers and IEEE arithmetic in the same
    order; so all ranks come to the same result after the same step. Looks touch no generator, gradient or parameter.

    model: what is planned for. place: where. what: is planned, for the logs. tells: whether this rank logs.
    """

    def __init__(
        self,
        measurements: Measurements,
        decision: Decision,
        model: Shapes,
        auto: AutoOptions,
        place: Place,
        options: ReplanOptions | None = None,
        what: str = "",
        tells: bool = True,
    ) -> None:
        self.chosen = [ChosenPlan.of(decision, 0, decision.reason)]
        self.looks = 0
        self._measurements, self._model = measurements, model
        self._auto, self._options = auto, options or ReplanOptions()
        self._place, self._what, self._tells = place, what, tells
        self._state = _state_of(self.now, 0)
        self._allowance = self._options.allowance
        self._recorded: dict[int, ChosenPlan] = {}
        self._recorded_until = 0
        self._reference: Window | None = None
        self._warm = False
        self._stepped_at: float | None = None
        self._begin(None)

    @property
    def active(self) -> bool:
        """Whether plans change by themselves here."""
        return self._options.active

    @property
    def now(self) -> ChosenPlan:
        """The plan in force."""
        return self.chosen[-1]

    def stepped(self) -> None:
        """Counts an optimizer step."""
        now = time.perf_counter()
        if self._stepped_at is not None:
            self._durations.append(now - self._stepped_at)
        self._stepped_at = now

    def notes(self, meter: Meter) -> list[int]:
        """This rank's part of what `judge` looks at: as many integers on every rank."""
        if not self.active:
            return []
        totals, before = meter.totals, self._before
        encoded = totals.encoded_values - (before[0] if before else 0)
        num_bytes = totals.encoded_bytes - (before[1] if before else 0)
        return [
            round(_NANO * statistics.median(self._durations)) if self._durations else 0,
            round(_NANO * (time.perf_counter() - self._begun)),
            round(_NANO * 1000 * median_seconds_a_byte(list(meter.transfers))),
            encoded,
            num_bytes,
            len(self._durations),
        ]

    def judge(self, notes: Sequence[Sequence[int]], meter: Meter, step: int) -> ChosenPlan | None:
        """What to go over to after this step, on all ranks; None: go on as now. All ranks call it together.

        notes: all ranks', by rank.
        """
        if not self.active:
            return None
        if step <= self._recorded_until:
            self._begin(meter)
            found = self._recorded.pop(step, None)  # once, however often ranks meet after it
            if found is not None:
                self._state = _state_of(found, step)
                return self._choose(replace(found, reason=_replayed(found.reason)))
            return None
        if min(theirs[5] for theirs in notes) < _FEWEST_STEPS:
            return None
        window = _window(notes)
        self._allowance = self._allowance.earned(max(theirs[1] for theirs in notes) / _NANO)
        self._begin(meter)
        if not self._warm:  # the first window after a start, a switch or a look has what happens once
            self._warm = True
            return None
        why = window.differs(self._reference) if self._reference else None
        if self._state.rival is not None:
            why = "the last look found a better plan"
        self._reference = self._reference or window
        if not self._allowance.allows(early=why is not None):
            return None
        return self._look(step, why or "it is time")

    def replay(self, recorded: Sequence[ChosenPlan], until_step: int) -> None:
        """Repeats what was decided before up to a step, instead of measuring: all ranks with the same arguments."""
        self._recorded = {one.step: one for one in recorded if one.step <= until_step}
        self._recorded_until = until_step

    def state_dict(self) -> dict[str, Any]:
        """What was decided and measured so far; the same on all ranks."""
        return {
            "chosen": [one.to_json() for one in self.chosen],
            "state": self._state.to_json(),
            "measurements": self._measurements.to_json(),
            "allowance": self._allowance.to_json(),
            "looks": self.looks,
        }

    def resumable(self, state: Mapping[str, Any]) -> ChosenPlan:
        """The plan in force in a `state_dict`, as far as it can be had here."""
        return ChosenPlan.from_json(state["chosen"][-1])

    def is_under_floor(self, state: Mapping[str, Any]) -> bool:
        """Whether the plan in force in a `state_dict` has fewer bits than may be chosen now."""
        return is_under_floor(state["chosen"][-1]["bits"], self._auto.floor_bits)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` of as many ranks, with the plan that is `resumable`."""
        now = self.resumable(state)
        self.chosen = [ChosenPlan.from_json(one) for one in state["chosen"]]
        self._state = replace(PlanState.from_json(state["state"]), hierarchy=now.hierarchy)
        if now != self.now:
            self.chosen.append(now)
        self._measurements = self._possible(Measurements.from_json(state["measurements"]))
        left = Allowance(**state["allowance"])
        self._allowance = replace(self._allowance, looks=left.looks, cost=left.cost)
        self.looks = state["looks"]

    def take_up(self, state: Mapping[str, Any] | None, in_force: ChosenPlan) -> None:
        """Continues with the plan in force from a `state_dict`, or where that has another one, or is none, without."""
        if state is not None and state["chosen"][-1]["bits"] == in_force.bits:
            self.load_state_dict(state)
        else:
            self.begin_at(in_force.step, in_force)

    def continued(self, state: Mapping[str, Any], step: int) -> ChosenPlan:
        """Continues with this start's measurements and plan, on other ranks or floors; returns the plan."""
        own = self.now
        self.chosen = [ChosenPlan.from_json(one) for one in state["chosen"]]
        self._state = _state_of(own, step)
        return self._choose(replace(own, step=step))

    def begin_at(self, step: int, plan: ChosenPlan | None = None) -> None:
        """This plan, else that of this start, came into force after this step."""
        self.chosen = [replace(plan or self.now, step=step)]
        self._state = _state_of(self.now, step)

    def restarted(self, meter: Meter) -> None:
        """Counts begin anew: the meter, or the plan, is another one now."""
        self._reference, self._warm, self._stepped_at = None, False, None
        self._begin(meter)

    def interrupted(self) -> None:
        """What the run does until the next step is no part of it."""
        self._stepped_at = None

    def _possible(self, measurements: Measurements) -> Measurements:
        """Without what cannot be had here."""
        return measurements

    def _look(self, step: int, why: str) -> ChosenPlan | None:
        start = time.perf_counter()
        self._measurements = self._place.look(self._measurements)
        verdict = reconsider(
            self._state,
            self._measurements,
            self._model,
            self._auto.floor_bits,
            step,
            self._auto.planner,
            self._options.hysteresis,
        )
        cost = self._place.slowest(time.perf_counter() - start)
        self._allowance = self._allowance.spent(cost)
        self._state = verdict.state
        self.looks += 1
        if self._tells:
            about = f" at {self._what}" if self._what else ""
            _log.info(
                "look%s after step %d, because %s, %.0f ms: %s", about, step, why, 1e3 * cost, verdict.reason
            )
        self._reference, self._warm, self._stepped_at = None, False, None
        if verdict.decision is None:
            return None
        return self._choose(ChosenPlan.of(verdict.decision, step, verdict.reason))

    def _choose(self, plan: ChosenPlan) -> ChosenPlan:
        self.chosen.append(plan)
        return plan

    def _begin(self, meter: Meter | None) -> None:
        self._begun = time.perf_counter()
        self._durations: deque[float] = deque(maxlen=_MOST_STEPS)
        self._before = (meter.totals.encoded_values, meter.totals.encoded_bytes) if meter else None


def _state_of(plan: ChosenPlan, step: int) -> PlanState:
    return PlanState(plan.bits, plan.hierarchy, since_step=step, group_size=plan.group_size)


def _window(notes: Sequence[Sequence[int]]) -> Window:
    encoded = sum(theirs[3] for theirs in notes)
    return Window(
        step_seconds=max(theirs[0] for theirs in notes) / _NANO,
        line_seconds=sum(theirs[2] for theirs in notes) / len(notes) / _NANO / 1000,
        bits=8 * sum(theirs[4] for theirs in notes) / encoded if encoded else 0.0,
    )


def _replayed(reason: str) -> str:
    mark = "as recorded: "
    return reason if reason.startswith(mark) else mark + reason
