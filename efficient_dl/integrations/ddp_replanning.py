"""Re-planning while a model trains whose ranks all reduce together: where it looks, and what its nodes allow.

DDP's models and DeepSpeed's engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import Levels, Plan, ProcessGroupTransport, Transport, gather_json
from efficient_dl.comm.look import look
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, Shapes
from efficient_dl.comm.transport import telling_peers
from efficient_dl.integrations.auto import AutoOptions
from efficient_dl.integrations.native_wait import wait_for_native
from efficient_dl.integrations.plan_watch import ChosenPlan, PlanWatch, ReplanOptions, Sample


class Replanner(PlanWatch):
    """The `PlanWatch` of a model's all-reduces.

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
        sample: Sample,
        options: ReplanOptions | None = None,
    ) -> None:
        self.plan = plan
        self.levels = levels
        self._sample = sample
        place = _AllRanks(control, carrier, levels, model.itemsize, self._sample, auto)
        super().__init__(
            self._possible(measurements), decision, model, auto, place, options, tells=control.rank == 0
        )

    def keep_sample(self, x: Tensor, numels: Sequence[int]) -> None:
        """Copies values of a bucket's gradients before they are reduced, for the look after this step."""
        self._sample.keep(x, numels)

    def forget_sample(self) -> None:
        """The sample was of a step that is over."""
        self._sample.forget()

    def resumable(self, state: Mapping[str, Any]) -> ChosenPlan:
        """The plan in force in a `state_dict`, as far as it can be had on these nodes."""
        last = super().resumable(state)
        is_flat = last.hierarchy and self.levels is None
        return (
            replace(last, hierarchy=False, reason=f"{last.reason}; flat on these nodes") if is_flat else last
        )

    def _possible(self, measurements: Measurements) -> Measurements:
        """Without a hierarchy that these nodes do not have."""
        return measurements if self.levels is not None else flat(measurements)


@dataclass(frozen=True)
class _AllRanks:
    """The `Place` of an all-reduce of all ranks."""

    control: ProcessGroupTransport
    carrier: Transport
    levels: Levels | None
    itemsize: int
    sample: Sample
    auto: AutoOptions

    def look(self, known: Measurements) -> Measurements:
        with telling_peers(self.control, self.carrier, *(self.levels.transports if self.levels else [])):
            values, segments = self.sample.taken()
            return look(
                known,
                self.carrier,
                self._native,
                self.levels,
                self.itemsize,
                values,
                segments,
                self.auto.kernel,
                feeds_back=self.auto.feeds_back,
            )

    def slowest(self, seconds: float) -> float:
        return max(gather_json(seconds, self.control))

    def _native(self, x: Tensor) -> None:
        wait_for_native(
            lambda: dist.all_reduce(x, group=self.control.group, async_op=True),
            self.control,
            "all-reduce, in a look at the links,",
        )


def flat(measurements: Measurements) -> Measurements:
    """The same, as of ranks that all reduce as equals."""
    return replace(measurements, between=None, inside=None)
