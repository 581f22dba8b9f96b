"""Re-planning while a sharded model trains: its gradients, its replicas and its weights, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import ChunkLayout, Compressor
from efficient_dl.comm.look import LOOK_NUMEL, look
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.transport import telling_peers
from efficient_dl.integrations.fsdp_auto import (
    WEIGHTS,
    Chosen,
    Planned,
    gradient_numels,
    native_of,
    of_the_first,
    sample_of_weights,
)
from efficient_dl.integrations.fsdp_setup import REPLICATE, SHARD
from efficient_dl.integrations.fsdp_units import Unit
from efficient_dl.integrations.plan_watch import ChosenPlan, PlanWatch, ReplanOptions, Sample

ABOUT = {
    SHARD: "gradients",
    REPLICATE: "replicas",
    WEIGHTS: "weights",
}  # as `FsdpCompression.stats` names them
Everyone = Callable[[Any], Mapping[int, Any]]


class FsdpReplanner:
    """A `PlanWatch` for each thing that was planned, among all ranks of the model's groups.

    What is allowed for looks is shared out evenly. Whatever one of them decides, the windows of all begin anew.

    planned: what was measured at the start. compressors: of "gradients", "replicas" and "weights".
    everyone: gathers a value, as JSON holds it, from all ranks of all of the model's groups, by global rank; all of
        them call it together.
    samples: set by the owner; whether the next backward pass is to be sampled.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        units: Sequence[Unit],
        compressors: Mapping[str, Compressor],
        everyone: Everyone,
        options: ReplanOptions,
    ) -> None:
        self.samples = False
        self._sample = Sample(sum(gradient_numels(units)))
        self._compressors = compressors
        self._active = options.active
        options = replace(options, allowance=options.allowance.shared(len(planned)))
        self._watches = {
            one.what: PlanWatch(
                one.measurements,
                one.decision,
                one.model,
                one.auto,
                _Groups(one, units, self._sample, everyone),
                options,
                what=ABOUT[one.what],
                tells=dist.get_rank() == 0,
            )
            for one in planned
        }

    @property
    def active(self) -> bool:
        """Whether plans change by themselves here."""
        return self._active

    @property
    def chosen(self) -> Chosen:
        """The plans in force, of what is watched."""
        return Chosen(
            {what: watch.now.bits for what, watch in self._watches.items()},
            {what: watch.now.reason for what, watch in self._watches.items()},
        )

    @property
    def plans(self) -> list[dict[str, Any]]:
        """All plans that came into force, by step: {"about", "step", "bits", "reason"}."""
        rows = [
            {"about": ABOUT[what], "step": one.step, "bits": one.bits, "reason": one.reason}
            for what, watch in self._watches.items()
            for one in watch.chosen
        ]
        return sorted(rows, key=lambda row: row["step"])

    @property
    def looks(self) -> int:
        """How many looks there were, of all that is watched together."""
        return sum(watch.looks for watch in self._watches.values())

    def begin_pass(self) -> None:
        """A backward pass begins: what was kept is of another one, which a GradScaler has skipped, say."""
        self._sample.forget()

    def keep_sample(self, x: Tensor, layout: ChunkLayout) -> None:
        """Copies values of a reduce-scatter's input, for a look after this step, if it is sampled."""
        if self.samples:  # each parameter's part of a chunk, where it lies
            for chunk, shard in zip(layout.chunks(x), layout.bucket.shards, strict=True):
                for position, numel in zip(shard.parameters, shard.segments, strict=True):
                    start, _ = layout.slots[position]
                    self._sample.keep(chunk[start : start + numel], [numel])

    def stepped(self) -> None:
        """Counts an optimizer step."""
        for watch in self._watches.values():
            watch.stepped()

    def notes(self) -> dict[str, list[int]]:
        """This rank's part of what `judge` looks at."""
        return {what: watch.notes(self._meter(what)) for what, watch in self._watches.items()}

    def judge(self, notes: Sequence[Mapping[str, Sequence[int]]], step: int) -> list[str]:
        """Which plans change after this step, on all ranks; `chosen` has them. All ranks call it together.

        notes: all ranks', by rank. Raises TransportError if a rank is gone.
        """
        looks = self.looks
        changed = [
            what
            for what, watch in self._watches.items()
            if watch.judge([theirs[what] for theirs in notes], self._meter(what), step) is not None
        ]
        self._sample.forget()
        for what, watch in self._watches.items():
            if changed:
                watch.restarted(self._meter(what))
            elif self.looks > looks:
                watch.interrupted()
        return changed

    def replay(self, rows: Sequence[Mapping[str, Any]], until_step: int) -> None:
        """See `FsdpCompression.replay`."""
        for what, watch in self._watches.items():
            recorded = [
                ChosenPlan(row["step"], row["bits"], False, row["reason"])
                for row in rows
                if row["about"] == ABOUT[what]
            ]
            watch.replay(recorded, until_step)

    def state_dict(self) -> dict[str, Any]:
        """What was decided and measured so far, by what it is about; the same on all ranks."""
        return {what: watch.state_dict() for what, watch in self._watches.items()}

    def load_state_dict(
        self, state: Mapping[str, Any], in_force: Chosen, step: int, is_resized: bool
    ) -> None:
        """Continues after `step` from a `state_dict`, or without what it lacks.

        in_force: what the run goes on with. is_resized: the state is of another mesh; its plans so far are kept, its
        measurements are not.
        """
        for what, watch in self._watches.items():
            saved = state.get(what)
            bits = in_force.bits.get(what, watch.now.bits)
            if saved is not None and is_resized:
                watch.continued(saved, step)
            else:
                watch.take_up(saved, ChosenPlan(step, bits, False, in_force.reasons.get(what, "")))
            watch.restarted(self._meter(what))

    def _meter(self, what: str) -> Any:
        return self._compressors[ABOUT[what]].meter


@dataclass(frozen=True)
class _Groups:
    """The `Place` of one planned thing: every group measures at once, and the first of them counts."""

    planned: Planned
    units: Sequence[Unit]
    sample: Sample
    everyone: Everyone

    def look(self, known: Measurements) -> Measurements:
        one = self.planned
        with telling_peers(one.own, *([one.other] if one.other else [])):
            if one.what == WEIGHTS:
                values, segments = sample_of_weights(self.units, LOOK_NUMEL)
            else:
                values, segments = self.sample.taken()
            found = look(
                known,
                one.own,
                native_of(one.what, one.own),
                None,
                one.model.itemsize,
                values,
                segments,
                one.auto.kernel,
                one.auto.planner.native_one_way,
                feeds_back=one.auto.feeds_back,
            )
            return of_the_first(found, one.other)

    def slowest(self, seconds: float) -> float:
        return max(self.everyone(seconds).values())
