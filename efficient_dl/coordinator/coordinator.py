"""The thin shell around the scheduler: rank 0 decides for all ranks, and every rank checks what it decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from efficient_dl.coordinator.agreement import require_agreement
from efficient_dl.coordinator.assignment import Decision
from efficient_dl.coordinator.convergence import ended_partitions
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import PartitionState, RankFacts, ScheduleOptions
from efficient_dl.coordinator.history import Entry, History
from efficient_dl.coordinator.report import Report, merged_costs, merged_losses, merged_ranks, static_facts
from efficient_dl.coordinator.rounds import StoreRounds
from efficient_dl.coordinator.scheduler import schedule
from efficient_dl.coordinator.wording import counted
from efficient_dl.errors import CheckpointError, PlanMismatch

SCHEDULER_VERSION = 3  # another number for every change by which equal facts may give another decision
KEPT_LOSSES = 100  # stages of which a partition's losses are remembered


@dataclass(frozen=True)
class _Inputs:
    """What rank 0 gave to the scheduler, for the others to give to theirs."""

    costs: list[PartitionCosts]
    ranks: list[RankFacts]
    losses: list[float | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> _Inputs:
        return _Inputs(
            [PartitionCosts(**cost) for cost in value["costs"]],
            [RankFacts(**facts) for facts in value["ranks"]],
            value["losses"],
        )


class Coordinator:
    """Decides, at the end of each stage, which partition trains where. All ranks make one and call `decide` alike.

    options, facts: equal on all ranks. facts: what else must be equal (a hash of the data, a version), JSON values.
    store: torch's; None takes that of the default process group. It must be new after a restart, as that one is.
    timeout: seconds for which rank 0 waits for the slowest rank's report; the others wait twice as long for rank 0.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        options: ScheduleOptions,
        *,
        store: dist.Store | None = None,
        timeout: float = 300.0,
        facts: Mapping[str, Any] | None = None,
        name: str = "coordinator",
    ) -> None:
        own = store if store is not None else dist.distributed_c10d._get_default_store()
        self.options = options
        self.history = History()
        self.states: tuple[PartitionState, ...] = ()
        self.costs: tuple[PartitionCosts, ...] = ()
        self._speeds: tuple[float, ...] = ()
        self._links: tuple[float | None, ...] = ()
        self._planned_with: dict[str, Any] | None = None  # the options of the last decision
        self._facts = dict(facts or {})
        self._rounds = StoreRounds(own, rank, world_size, name, timeout)

    def decide(self, step: int, report: Report, *, replan: bool = False) -> Decision:
        """The decision that holds from `step` on, equal on all ranks; in it nothing trains when the training has ended.

        step: how many steps are done. report: what this rank measured since the last decision. As long as the last
        decision holds for these ranks and options (after a resume in the middle of a stage), it is returned as it is,
        unless replan is set. Save the state after the call, before partitions move: a resume then finds the decision.

        Raises, on every rank: PlanMismatch if ranks disagree about anything that the decision follows from, or get
        another decision from it; ConfigError if no assignment is possible; TransportError if a rank is missing.
        """
        holding = self._holding(step) if not replan else None

        def answer(values: list[Any]) -> dict[str, Any]:
            require_agreement([value["facts"] for value in values])
            reports = [Report.from_json(report.names, value["report"]) for value in values]
            self._check_losses(reports, holding is not None)
            if holding is not None:
                return {"fingerprint": holding.fingerprint()}
            inputs = self._merged(report.names, reports)
            decision = schedule(
                inputs.costs, inputs.ranks, self._advanced(step, inputs.losses), self.options, step
            )
            return {"inputs": inputs.to_json(), "fingerprint": decision.fingerprint()}

        own = {
            "facts": self._compared(step, report, replan) | static_facts(report),
            "report": report.to_json(),
        }
        published = self._rounds.exchange(own, answer)
        if holding is not None:
            self._verify(holding, published["fingerprint"])
            return holding
        inputs = _Inputs.from_json(published["inputs"])
        states = self._advanced(step, inputs.losses)
        decision = schedule(inputs.costs, inputs.ranks, states, self.options, step)
        self._verify(decision, published["fingerprint"])
        self._commit(step, inputs, states, decision)
        return decision

    @property
    def knows_links(self) -> bool:
        """Whether the links of as many ranks were measured before; the same on all ranks."""
        return len(self._links) == self._rounds.world_size and None not in self._links

    @property
    def knows_speeds(self) -> bool:
        """Whether it has decided for as many ranks before; the same on all ranks."""
        return len(self._speeds) == self._rounds.world_size

    def speed_of(self, rank: int) -> float:
        """Relative to the rank on which costs hold, as last decided with; 1.0 if that is not known."""
        return self._speeds[rank] if self.knows_speeds else 1.0

    def forget_speeds(self) -> None:
        """The ranks, and the links between them, are others now; all of them call it, before they decide."""
        self._speeds, self._links = (), ()

    def close(self) -> None:
        """Call it at the end of training, on all ranks: until then the others may still read what rank 0 decided."""
        self._rounds.close()

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, as JSON has it; equal on all ranks."""
        return {"history": self.history.to_rows(), **self._progress()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if it is not what `state_dict` returned."""
        try:
            history = History.from_rows(state["history"])
            states = tuple(
                PartitionState(one["steps"], tuple(one["losses"]), one["frozen"], tuple(one["ranks"]))
                for one in state["states"]
            )
            costs = tuple(PartitionCosts(**cost) for cost in state["costs"])
            speeds, options = tuple(state["speeds"]), state["options"]
            links = tuple(state.get("links", ()))  # not in older checkpoints
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "this is not a coordinator's state", found=f"{type(error).__name__}: {error}"
            ) from error
        self.history, self.states, self.costs = history, states, costs
        self._speeds, self._links, self._planned_with = speeds, links, options

    def _progress(self) -> dict[str, Any]:
        return {
            "states": [asdict(state) for state in self.states],
            "costs": [asdict(cost) for cost in self.costs],
            "speeds": list(self._speeds),
            "links": list(self._links),
            "options": self._planned_with,
        }

    def _holding(self, step: int) -> Decision | None:
        """The last decision, if it was for as many ranks and the same options, and is not over, or was the end."""
        if not len(self.history):
            return None
        last = self.history[-1]
        same = last.world_size == self._rounds.world_size and self._planned_with == asdict(self.options)
        holds = last.step <= step < last.decision.until_step or (last.decision.ended and step == last.step)
        return last.decision if same and holds else None

    def _compared(self, step: int, report: Report, replan: bool) -> dict[str, Any]:
        """What must be equal on all ranks."""
        last = self.history[-1].decision.fingerprint() if len(self.history) else "none"
        state = json.dumps(self._progress())
        return {
            "scheduler version": SCHEDULER_VERSION,
            "step": step,
            "replan": replan,
            **{f"partitions.{index}": name for index, name in enumerate(report.names)},
            **{f"options.{key}": value for key, value in asdict(self.options).items()},
            **{f"facts.{key}": value for key, value in self._facts.items()},
            "number of decisions": len(self.history),
            "last decision": last,
            "state": hashlib.sha256(state.encode()).hexdigest()[:16],
        }

    def _merged(self, names: Sequence[str], reports: Sequence[Report]) -> _Inputs:
        known = [cost.name for cost in self.costs]
        if known and known != list(names):
            raise CheckpointError(
                "the model is cut otherwise than when its state was saved",
                expected=f"partitions {', '.join(known)}",
                found=", ".join(names),
                fix="cut it as before, or start the coordinator without its saved state",
            )
        ranks = merged_ranks(reports, self._speeds, self._links)
        before = self.costs or [PartitionCosts(name) for name in names]
        return _Inputs(merged_costs(reports, ranks, before), ranks, merged_losses(reports, len(names)))

    def _check_losses(self, reports: Sequence[Report], holds: bool) -> None:
        """Losses are of the stage that ends: from all ranks that trained a partition or, after a resume, from none."""
        last = self.history[-1] if len(self.history) else None
        for index in range(len(reports[0].names)):
            reporting = [rank for rank, report in enumerate(reports) if index in report.losses]
            trained: list[int] = []
            same_ranks = last is not None and last.world_size == self._rounds.world_size
            if last is not None and same_ranks and not holds and last.decision.training[index]:
                trained = list(last.decision.assignment.ranks[index])
            if reporting and reporting != trained:
                raise PlanMismatch(
                    f"losses of partition {index} do not come from the ranks that trained it",
                    expected=f"from {counted('rank', trained)}, or from none"
                    if trained
                    else "none at this step",
                    found=f"from {counted('rank', reporting)}",
                )

    def _advanced(self, step: int, losses: Sequence[float | None]) -> tuple[PartitionState, ...]:
        """The states, with what was trained since the last decision."""
        states = self.states or tuple(PartitionState() for _ in losses)
        if not len(self.history):
            return states
        last = self.history[-1]
        if step < last.step:
            raise PlanMismatch(
                "the step is before that of the last decision",
                expected=f"at least {last.step}",
                found=str(step),
                fix="load the coordinator's state from the checkpoint of this step",
            )
        return tuple(
            replace(
                state,
                steps=state.steps + (step - last.step if trained else 0),
                losses=(*state.losses, *([] if loss is None else [loss]))[-KEPT_LOSSES:],
            )
            for state, trained, loss in zip(states, last.decision.training, losses, strict=True)
        )

    def _verify(self, decision: Decision, published: str) -> None:
        """Every rank compares what it came to with what rank 0 published; all hear of it before one acts."""

        def answer(fingerprints: list[Any]) -> None:
            differing = [rank for rank, own in enumerate(fingerprints) if own != published]
            if differing:
                raise PlanMismatch(
                    f"{counted('rank', differing)} came to another decision than rank 0 from the same facts",
                    differs=f"fingerprint {fingerprints[differing[0]]} (rank {differing[0]}), {published} (rank 0)",
                    fix="start every rank with the same version of efficient_dl and of Python, on like processors",
                )

        self._rounds.exchange(decision.fingerprint(), answer)

    def _commit(
        self, step: int, inputs: _Inputs, states: Sequence[PartitionState], decision: Decision
    ) -> None:
        ended = ended_partitions(states, self.options)
        self.states = tuple(
            replace(
                state,
                frozen=index in ended and ended[index].for_good,
                ranks=decision.assignment.ranks[index],
            )
            for index, state in enumerate(states)
        )
        self.costs = tuple(inputs.costs)
        self._speeds = tuple(facts.speed for facts in inputs.ranks)
        self._links = tuple(facts.bytes_per_second for facts in inputs.ranks)
        self._planned_with = asdict(self.options)
        names = tuple(cost.name for cost in inputs.costs)
        self.history.append(Entry(step, self._rounds.world_size, self.options.kind, names, decision))
