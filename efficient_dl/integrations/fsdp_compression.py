"""The `FsdpCompression` of a sharded model: its collectives, its statistics and its state."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import (
    ChunkLayout,
    Compressor,
    OnAlarm,
    check_equal,
    combined,
    summary,
)
from efficient_dl.errors import CheckpointError, ConfigError, EdlError, RanksDiverged
from efficient_dl.integrations.auto import log_saved_plan
from efficient_dl.integrations.ddp_transport import PROCESS_GROUP
from efficient_dl.integrations.fsdp_auto import Automatic, Chosen
from efficient_dl.integrations.fsdp_collectives import FsdpCollectives
from efficient_dl.integrations.fsdp_comms import Lane
from efficient_dl.integrations.fsdp_guards import Guards
from efficient_dl.integrations.fsdp_replanning import ABOUT, FsdpReplanner
from efficient_dl.integrations.fsdp_setup import agree
from efficient_dl.integrations.fsdp_units import Unit
from efficient_dl.integrations.plan_change import go_over
from efficient_dl.integrations.plan_watch import ReplanOptions

_log = logging.getLogger(__name__)
_STATE_VERSION = 2


class FsdpCompression:
    """Compressed gradients and weights of one sharded model, as `compress` set it up."""

    def __init__(
        self,
        units: Sequence[Unit],
        lanes: Sequence[Lane],
        optimizer: torch.optim.Optimizer | None,
        compressors: Mapping[str, Compressor],
        automatic: Automatic | None = None,
        *,
        check_every: int,
        scaler: torch.amp.GradScaler | None,
        shadow: bool,
        max_relative_error: float | None,
        on_alarm: OnAlarm,
        replan: ReplanOptions | None = None,
    ) -> None:
        # lanes: each unit's. compressors: of "gradients", "replicas" and "weights".
        self.shadow = shadow
        self._automatic = automatic
        self._chosen = automatic.chosen if automatic is not None else None
        self._check_every = check_every
        self._scaler = scaler
        self._commits_itself = optimizer is None
        self._units, self._lanes = list(units), list(lanes)
        self._control = self._lanes[0].control
        self._controls = list({id(one): one for lane in lanes for one in lane.controls}.values())
        self._optimizer_steps = 0
        self._checks = 0
        self._compressors = {key: compressors[key] for key in ("gradients", "replicas", "weights")}
        self._tell_plans()
        self._replanner: FsdpReplanner | None = None
        if automatic is not None and automatic.planned:
            self._replanner = FsdpReplanner(
                automatic.planned, units, self._compressors, self._everyone, replan or ReplanOptions()
            )
        self._collectives = FsdpCollectives(
            self._units,
            self._lanes,
            self._compressors,
            self.shadow,
            owner=self,
            begin=self._begin_step,
            end=self._end_step,
            sample=self._sample,
            changes=automatic is not None,
        )
        self._guards = Guards(
            self._collectives.compressing, self._controls, max_relative_error, on_alarm, self.shadow
        )
        self._watch_anew()
        self._count(0)
        if any(unit.replicas is not None for unit in units) and self.replicas_plan.codec == "none":
            _log.warning("HSDP: gradients are all-reduced between replicas by torch, uncompressed")
        self._step_hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None

    def _tell_plans(self) -> None:
        gradients, replicas, weights = self._compressors.values()
        self.plan, self.replicas_plan, self.weights_plan = gradients.plan, replicas.plan, weights.plan

    def _go_over(self, automatic: Automatic, chosen: Chosen) -> None:
        """Goes over to the plans of a choice between two steps; on all ranks together. Statistics go on.

        Residuals that no packet takes along any more go out with the next step's gradients, which torch's own
        collective then carries.
        """
        for key, plan in automatic.plans(chosen).items():
            compressor = self._compressors[key]
            if plan.facts() == compressor.plan.facts():
                compressor.plan = plan  # another reason at most
                continue
            go_over(compressor, plan, self._names_of_all if key == "gradients" else lambda kept: [kept])
        self._chosen = chosen
        self._tell_plans()
        self._collectives.follow()
        self._watch_anew()

    def _watch_anew(self) -> None:
        plans = {key: compressor.plan.bits for key, compressor in self._collectives.compressing.items()}
        self._guards.watch(self._collectives.compressing, plans if self._automatic is not None else None)

    @property
    def _compresses(self) -> bool:
        return bool(self._collectives.compressing)

    @property
    def _replans(self) -> bool:
        return self._replanner is not None and self._replanner.active

    def disable(self, reason: str) -> None:
        """Turns compression off on all ranks: from then on all gradients and weights go by torch's own collectives.

        One rank is enough. It takes effect on all ranks at once, after the next comparison of their parameters: the
        next optimizer step whose number is a multiple of check_every, or the next `check()`. It costs no message until
        then. It is logged on all ranks, told by `stats()["disabled"]`, and kept by `state_dict`. What error feedback
        had kept until then is not sent any more.

        reason: for the logs.
        """
        if self._compresses or self._replans:
            self._guards.wish(reason)
        else:
            _log.warning('there is nothing to disable: bits="none", weights="none"')

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks of the model's groups, instead of this rank's; then all of them must call it.

        Returns bits, weights_bits and replicas_bits (of HSDP's second axis) with their codecs and reasons, transport
        ("process_group", the model's own and two more of its ranks), messages, kernel, exact, shadow,
        error_feedback, world_size (of the first module's shard group), checks, disabled (None or {"step", "reason"}),
        the alarms so far; with bits="auto" the plans that came into force, each {"about", "step", "bits", "reason"},
        about "gradients", "replicas" or "weights", and how many looks there were; and of gradients, replicas and
        weights together the `summary` of the meters, as for DistributedDataParallel, with a row for each parameter
        (with error feedback also residual_norm, Euclidean); under "gradients", "replicas" and "weights" the same of
        each alone. A step is one backward pass that reduces gradients.

        bytes_source: "counted", "shadow" (would have been sent), or "analytic" for what torch sends itself (bits or
        weights "none", and after `disable`: n − 1 chunks, padding included, for each of its calls).
        replica_wire_bytes: HSDP's all-reduce by torch, calculated; 0 where we make it. native_gathers,
        native_gather_bytes: gathers of weights that no codec takes. The last three are not in the sums.
        """
        self._collectives.settle()
        states = {key: compressor.meter_state() for key, compressor in self._compressors.items()}
        counts, norms = self._collectives.counts, self._residual_squares(states["gradients"]["parameters"])
        if all_ranks:
            everyone = self._guards.everyone({"states": states, "counts": counts, "norms": norms})
            ranks = list(everyone.values())
            states = {key: combined([one["states"][key] for one in ranks]) for key in states}
            counts = {key: sum(one["counts"][key] for one in ranks) for key in counts}
            norms = {name: sum(one["norms"][name] for one in ranks) for name in norms}
        figures = summary(combined(list(states.values())))
        for name, square in norms.items():
            figures["parameters"][name]["residual_norm"] = math.sqrt(square)
        gradients, replicas, weights = self._compressors.values()
        used = [
            compressor.codec.kernel_for(self._control.device)
            for compressor in (gradients, weights, replicas)
            if compressor.plan.codec != "none"
        ]
        return {
            "bits": self.plan.bits,
            "replicas_bits": self.replicas_plan.bits,
            "weights_bits": self.weights_plan.bits,
            "codec": self.plan.codec,
            "replicas_codec": self.replicas_plan.codec,
            "weights_codec": self.weights_plan.codec,
            "reason": self.plan.reason,
            "replicas_reason": self.replicas_plan.reason,
            "weights_reason": self.weights_plan.reason,
            "transport": PROCESS_GROUP,
            "overrides": dict(self.plan.overrides),
            "messages": "bounded" if self.plan.is_bounded else "exact",
            "error_feedback": any(c.plan.error_feedback for c in (gradients, replicas)),
            "kernel": used[0] if used else "none",
            "exact": all(compressor.exact for compressor in self._compressors.values()),
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "bytes_source": self._bytes_source(),
            "disabled": self._guards.switch.off,
            "alarms": self._guards.alarms,
            "plans": self.plans,
            "looks": self._replanner.looks if self._replanner else 0,
            **counts,
            **figures,
            **{key: summary(state) for key, state in states.items()},
        }

    def check(self) -> None:
        """Compares the weights that ranks compute with, bit by bit; every rank must call it. Raises RanksDiverged.

        Every rank holds another shard, so it gathers all units once more, the same way as in a forward pass, and
        compares a hash of every gathered parameter; not where torch gathers. Between replicas (HSDP) it compares the
        shards themselves. Then the ranks agree on what was wished with `disable`, and on alarms about times.

        With bits="auto" plans may change here: what is decided holds from the next step on, on all ranks. Raises
        TransportError if a rank is gone.
        """
        self._check(compares=True)

    def _check(self, compares: bool) -> None:
        failure = self._compared() if compares else None
        self._checks += compares
        planner, step = self._replanner, self._optimizer_steps
        told = self._guards.agree(step, failure, planner.notes() if planner is not None else None)
        if self._guards.is_off:
            self._collectives.turn_off()
        elif planner is not None and self._automatic is not None and (changed := planner.judge(told, step)):
            chosen = planner.chosen
            self._go_over(self._automatic, chosen)
            if dist.get_rank() == 0:
                for what in changed:
                    reason = chosen.reasons[what]
                    _log.warning("bits auto, %s, from step %d on: %s", ABOUT[what], step + 1, reason)

    def _compared(self) -> RanksDiverged | None:
        failure: RanksDiverged | None = None
        for unit, gather, lane in zip(self._units, self._collectives.gathers, self._lanes, strict=True):
            compared = [(gather.gathered(), lane.control)]
            if lane.replica_control is not None:
                compared.append((unit.shards(), lane.replica_control))
            for parameters, control in compared:
                try:
                    if parameters is not None:
                        check_equal(parameters, control, self._optimizer_steps)
                except RanksDiverged as error:  # told to all below: others are about to compare the next unit
                    failure = failure or error
        return failure

    def replay(self, plans: Sequence[Mapping[str, Any]], until_step: int) -> None:
        """With bits="auto": goes over to these plans after the same steps again, up to a step, and measures nothing.

        plans: rows of `stats()["plans"]`. For a run that goes on from before decisions that were recorded, and is to
        come to the same bits as before. All ranks call it with the same arguments, before the next step. Raises
        ConfigError where plans do not change (replan=False).
        """
        if self._replanner is None:
            return
        if not self._replans:
            raise ConfigError(
                "this run does not change its plans, and so cannot repeat changes",
                fix="replan=True, an optimizer and check_every as in the run that is repeated",
            )
        self._replanner.replay(plans, until_step)

    @property
    def plans(self) -> list[dict[str, Any]]:
        """With bits="auto" the plans in force so far, as in `stats`, in the order of their steps; else []."""
        return self._replanner.plans if self._replanner else []

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, keyed by parameter name: plain numbers and strings, and with error feedback a float32
        tensor for each parameter. Save one for each rank."""
        self._collectives.settle()
        return {
            "version": _STATE_VERSION,
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "replica": self._replica,
            "optimizer_steps": self._optimizer_steps,
            "shadow": self.shadow,
            "auto": None if self._chosen is None else self._chosen.to_json(),
            "counts": self._collectives.counts,
            "guards": self._guards.state_dict(),
            "replanner": self._replanner.state_dict() if self._replanner else None,
            **{key: compressor.state_dict() for key, compressor in self._compressors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`; every rank must call it, with its own.

        With bits="auto" a run goes on with the plans it was saved with, whatever this start has measured, which is
        logged, and with the measurements and the allowance for looks that it had. On another mesh this start's plans
        hold. There, and between a shadow run and a real one, the counters and the residuals start again from zero,
        which is logged, too. Raises PlanMismatch for other bits or weights, also where a higher floor_bits excludes the
        saved ones; CheckpointError for another rank, model or version.
        """
        self._follow_saved(state)
        resized = self._is_resized(state)
        afresh = resized or state["shadow"] != self.shadow
        replanned = resized and self._chosen is not None and state.get("auto") is not None
        if not replanned:
            for key, compressor in self._compressors.items():
                compressor.check_state(state[key])
        for key, compressor in self._compressors.items():
            if not afresh:
                compressor.load_state_dict(state[key])
            elif replanned:
                compressor.start_afresh()
            else:
                compressor.load_state_dicts([state[key]], residuals=False)
        self._collectives.counts = dict.fromkeys(state["counts"], 0) if afresh else state["counts"]
        self._count(state["optimizer_steps"])
        self._guards.load_state_dict(state["guards"])
        if self._guards.switch.off is not None:
            self._collectives.turn_off()
        self._collectives.prepare()
        if self._replanner is not None and self._chosen is not None:
            before = state.get("replanner") or {}
            self._replanner.load_state_dict(before, self._chosen, self._optimizer_steps, resized)
        if afresh:
            _log.warning(
                "compression state of %d x %d ranks%s, restored on %d x %d%s: the counters%s start again from zero%s",
                state["replica"][1],
                state["world_size"],
                " in the shadow" * state["shadow"],
                self._replica[1],
                self._control.world_size,
                " in the shadow" * self.shadow,
                " and residuals" if any(c.residuals is not None for c in self._compressors.values()) else "",
                f", with the plans of this start: {self._chosen}" if replanned else "",
            )

    def _check_place(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION or "replicas" not in state:
            raise CheckpointError(
                "this is no compression state of a sharded model, or one of another version",
                expected=f"what FsdpCompression.state_dict() returns, version {_STATE_VERSION}",
                found=f"version {state.get('version')}, with {', '.join(sorted(state))}",
            )
        saved_rank, own_rank = [state["rank"], state["replica"][0]], [self._control.rank, self._replica[0]]
        if not self._is_resized(state) and saved_rank != own_rank:
            what = "" if saved_rank[1] == own_rank[1] else f" of replica {saved_rank[1]}"
            raise CheckpointError(
                f"rank {own_rank[0]} was given the compression state of rank {saved_rank[0]}{what}",
                fix="save state_dict() on every rank, and load each rank's own",
            )

    def _is_resized(self, state: Mapping[str, Any]) -> bool:
        saved = state["world_size"], state["replica"][1]
        return saved != (self._control.world_size, self._replica[1])

    def _follow_saved(self, state: Mapping[str, Any]) -> None:
        """Goes over to the plans of the saved run, if it had any, and all ranks were given states of the same one."""
        failure: EdlError | None = None
        try:
            self._check_place(state)
        except EdlError as error:
            failure = error
        saved, replica = state.get("auto"), state.get("replica")
        ranks = [state.get("world_size"), replica and replica[1]]
        step = str(state.get("optimizer_steps"))  # looks are due after the same ones
        facts = {"auto": str(saved), "ranks": str(ranks), "step": step}
        agree({"checkpoint": facts}, self._controls, failure)
        automatic = self._automatic
        if saved is None or automatic is None or self._is_resized(state) or self._chosen is None:
            return
        chosen = automatic.resumed(Chosen.from_json(saved))
        if chosen.bits != automatic.chosen.bits and self._control.rank == self._replica[0] == 0:
            log_saved_plan(str(chosen), str(automatic.chosen))
        self._go_over(automatic, chosen)

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads, destroys the groups it made, and gives the model torch's own collectives back.

        timeout: seconds that a peer may keep the threads waiting; then the connections are broken. A process that ends
        without close() ends its threads in the same way.
        """
        if self._step_hook is not None:
            self._step_hook.remove()
        self._collectives.close(timeout)

    def _everyone(self, value: Any) -> Mapping[int, Any]:
        return self._guards.everyone(value)

    def _names_of_all(self, names: list[str]) -> list[list[str]]:
        return list(self._everyone(names).values())

    def _sample(self, x: Tensor, layout: ChunkLayout) -> None:
        if self._replanner is not None:
            self._replanner.keep_sample(x, layout)

    def _count(self, steps: int) -> None:
        self._optimizer_steps = steps
        if self._replanner is not None:
            looks = self._replans and self._guards.switch.off is None
            self._replanner.samples = looks and self._is_due(steps + 1)

    def _is_due(self, step: int) -> bool:
        return bool(self._check_every) and step % self._check_every == 0

    def _begin_step(self) -> None:
        if self._replanner is not None:
            self._replanner.begin_pass()
        feeding = [c for c in self._compressors.values() if c.residuals is not None]
        scaler = self._scaler
        scale = scaler.get_scale() if feeding and scaler is not None and scaler.is_enabled() else 1.0
        for compressor in self._compressors.values():
            compressor.begin_step(scale)

    def _end_step(self, exposed_seconds: float) -> None:
        self._collectives.settle()
        for lane in self._lanes:
            lane.weights_may_have_changed = True
        reduced_replicas = any(scatter.has_reduced_replicas for scatter in self._collectives.scatters)
        for scatter in self._collectives.scatters:
            scatter.has_reduced_replicas = False
        # Passes that are not all-reduced are no steps of the replicas' meter, or it would sample none that are.
        stepped = [key for key in self._compressors if key != "replicas" or reduced_replicas]
        for key in stepped:
            self._compressors[key].end_step(exposed_seconds if key == "gradients" else 0.0)
            if self._commits_itself:
                self._compressors[key].commit_step()
        if self._commits_itself:
            self._collectives.prepare()
        if self._guards.switch.off is None:
            self._guards.stepped(stepped)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._count(self._optimizer_steps + 1)
        # A fused optimizer runs in a step that its GradScaler skips, and skips inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if not (found_inf is not None and float(found_inf) > 0):
            for compressor in self._compressors.values():
                compressor.commit_step()
        self._collectives.prepare()
        if self._replanner is not None:
            self._replanner.stepped()
        if self._is_due(self._optimizer_steps) and (self._compresses or self._replans):
            self._check(compares=self._compresses)

    @property
    def _replica(self) -> list[int]:
        """Which replica this rank is part of, and how many there are; of the first module."""
        control = self._lanes[0].replica_control
        return [0, 1] if control is None else [control.rank, control.world_size]

    def _bytes_source(self) -> str:
        axes = {c.plan.codec == "none" for key, c in self._compressors.items() if key != "replicas"}
        if False in axes and self.shadow:
            return "shadow"
        axes |= {row["bits"] == "none" for row in self.plans if row["about"] != "replicas"}  # before a change
        natively = True in axes or self._guards.is_off
        return "analytic" if axes == {True} else "counted, analytic" if natively else "counted"

    def _residual_squares(self, names: Mapping[str, Any]) -> dict[str, float]:
        kept = [c.residuals for c in self._compressors.values() if c.residuals is not None]
        return {name: sum(residuals.norm(name) ** 2 for residuals in kept) for name in names} if kept else {}
