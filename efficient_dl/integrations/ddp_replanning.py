"""Re-planning while a DistributedDataParallel model trains: what ranks tell each other, looks, and what was decided."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import Levels, Meter, Plan, ProcessGroupTransport, Transport, gather_json
from efficient_dl.comm.alarm import median_seconds_a_byte
from efficient_dl.comm.look import LOOK_NUMEL, Allowance, Window, look
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, Shapes
from efficient_dl.comm.replanning import Hysteresis, PlanState, reconsider
from efficient_dl.comm.transport import telling_peers
from efficient_dl.errors import TransportError
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


class Replanner:
    """Watches a run's own counts, looks at links and codecs now and then, and decides, on all ranks the same.

    All that decides is gathered from all ranks first, and what follows is integers and IEEE arithmetic in the same
    order; so all ranks come to the same result after the same step. Looks touch no generator, gradient or parameter.

    plan: what was chosen means with the user's other wishes. model: what is planned for.
    levels: idle transports of the hierarchy, where one can be had.
    """

    def __init__(
        self,
        measurements: Measurements,
        decision: Decision,
        model: Shapes,
        auto: AutoOptions,
        plan: Callable[[ChosenPlan], Plan],
        control: ProcessGroupTransport,
        carrier: Transport,
        levels: Levels | None,
        options: ReplanOptions | None = None,
    ) -> None:
        self.plan = plan
        self.levels = levels
        self.chosen = [ChosenPlan.of(decision, 0, decision.reason)]
        self.looks = 0
        self._measurements, self._model = self._possible(measurements), model
        self._auto, self._options = auto, options or ReplanOptions()
        self._control, self._carrier = control, carrier
        self._state = _state_of(self.now, 0)
        self._allowance = self._options.allowance
        self._recorded: dict[int, ChosenPlan] = {}
        self._recorded_until = 0
        self._reference: Window | None = None
        self._warm = False
        self._sample: list[Tensor] = []
        self._segments: list[int] = []
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

    def keep_sample(self, x: Tensor, numels: Sequence[int]) -> None:
        """Copies values of a bucket's gradients before they are reduced, for the look after this step."""
        for part in x.split(list(numels)):
            left = LOOK_NUMEL - sum(self._segments)
            if self._sample and self._sample[0].dtype != x.dtype:
                return
            if left > 0 and part.numel():
                self._sample.append(part[:left].detach().clone())
                self._segments.append(self._sample[-1].numel())

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
        ]

    def judge(self, notes: Sequence[Sequence[int]], meter: Meter, step: int) -> ChosenPlan | None:
        """What to go over to after this step, on all ranks; None: go on as now. All ranks call it together.

        notes: all ranks', by rank.
        """
        if not self.active:
            return None
        if step <= self._recorded_until:
            self._begin(meter)
            found = self._recorded.get(step)
            if found is not None:
                self._state = _state_of(found, step)
                return self._choose(replace(found, reason=_replayed(found.reason)))
            return None
        if len(self._durations) < _FEWEST_STEPS:
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
        """The plan in force in a `state_dict`, as far as it can be had on these nodes."""
        last = ChosenPlan.from_json(state["chosen"][-1])
        flat = last.hierarchy and self.levels is None
        return replace(last, hierarchy=False, reason=f"{last.reason}; flat on these nodes") if flat else last

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

    def continued(self, state: Mapping[str, Any], step: int) -> ChosenPlan:
        """Continues with this start's measurements and plan, on other ranks or floors; returns the plan."""
        own = self.now
        self.chosen = [ChosenPlan.from_json(one) for one in state["chosen"]]
        self._state = _state_of(own, step)
        return self._choose(replace(own, step=step))

    def begin_at(self, step: int) -> None:
        """The plan of this start came into force after this step."""
        self.chosen = [replace(self.now, step=step)]
        self._state = replace(self._state, since_step=step)

    def _possible(self, measurements: Measurements) -> Measurements:
        """Without a hierarchy that these nodes do not have."""
        return measurements if self.levels is not None else flat(measurements)

    def restarted(self, meter: Meter) -> None:
        """Counts begin anew: the meter, or the plan, is another one now."""
        self._reference, self._warm, self._stepped_at = None, False, None
        self._begin(meter)

    def _look(self, step: int, why: str) -> ChosenPlan | None:
        start = time.perf_counter()
        sample = torch.cat(self._sample) if self._sample else None
        if sample is not None and not bool(torch.isfinite(sample).all()):
            sample = None  # codecs make flags of such blocks
        with telling_peers(self._control, self._carrier, *(self.levels.transports if self.levels else [])):
            self._measurements = look(
                self._measurements,
                self._carrier,
                self._native,
                self.levels,
                self._model.itemsize,
                sample,
                self._segments,
                self._auto.kernel,
            )
        verdict = reconsider(
            self._state,
            self._measurements,
            self._model,
            self._auto.floor_bits,
            step,
            self._auto.planner,
            self._options.hysteresis,
        )
        cost = max(gather_json(time.perf_counter() - start, self._control))
        self._allowance = self._allowance.spent(cost)
        self._state = verdict.state
        self.looks += 1
        if self._control.rank == 0:
            _log.info("look after step %d, because %s, %.0f ms: %s", step, why, 1e3 * cost, verdict.reason)
        self._reference, self._warm, self._stepped_at = None, False, None
        if verdict.decision is None:
            return None
        to = verdict.decision
        return self._choose(ChosenPlan.of(to, step, verdict.reason))

    def _native(self, x: Tensor) -> None:
        """Torch's own all-reduce, with our time-out."""
        work = dist.all_reduce(x, group=self._control.group, async_op=True)
        assert work is not None  # this rank is in the group
        try:
            work.wait(timedelta(seconds=self._control.timeout))
        except RuntimeError as error:
            raise TransportError(
                "torch's all-reduce failed in a look at the links",
                found=str(error).strip().splitlines()[0],
                where=f"{self._control.world_size} ranks, limited to {self._control.timeout:g} s",
                fix="read the ends of the other ranks' logs: one has stopped, is stuck or cannot be reached",
            ) from error

    def _choose(self, plan: ChosenPlan) -> ChosenPlan:
        self.chosen.append(plan)
        return plan

    def _begin(self, meter: Meter | None) -> None:
        self._begun = time.perf_counter()
        self._durations: deque[float] = deque(maxlen=_MOST_STEPS)
        self._before = (meter.totals.encoded_values, meter.totals.encoded_bytes) if meter else None

    def forget_sample(self) -> None:
        """The sample was of a step that is over."""
        self._sample.clear()
        self._segments.clear()


def flat(measurements: Measurements) -> Measurements:
    """The same, as of ranks that all reduce as equals."""
    return replace(measurements, between=None, inside=None)


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
