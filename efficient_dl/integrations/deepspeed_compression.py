"""The `EngineCompression` of a DeepSpeed engine: its collectives, its statistics and its state."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from efficient_dl.comm import (
    Compressor,
    ProcessGroupTransport,
    combined,
    gather_json,
    handshake,
    native_tally,
    summary,
)
from efficient_dl.comm.transport import telling_peers
from efficient_dl.errors import ConfigError, EdlError, PlanMismatch
from efficient_dl.integrations.auto import is_under_floor, log_saved_plan
from efficient_dl.integrations.ddp_replanning import Replanner
from efficient_dl.integrations.ddp_transport import PROCESS_GROUP
from efficient_dl.integrations.deepspeed_checkpoint import CheckpointFiles
from efficient_dl.integrations.deepspeed_plugs import EnginePlug, ZeroPlug, install, remove
from efficient_dl.integrations.deepspeed_reducers import (
    CompressedReducer,
    NativeReducer,
    Piece,
    Reducer,
    ShadowReducer,
    Steps,
)
from efficient_dl.integrations.deepspeed_settings import Settings
from efficient_dl.integrations.group_guards import GroupGuards
from efficient_dl.integrations.plan_change import go_over
from efficient_dl.integrations.plan_watch import ChosenPlan

_log = logging.getLogger(__name__)


class EngineCompression:
    """Compressed reduction of one engine's gradients, as `compress_engine` set it up."""

    def __init__(
        self,
        engine: Any,
        compressor: Compressor,
        control: ProcessGroupTransport,
        plug: EnginePlug | ZeroPlug,
        settings: Settings,
        replanner: Replanner | None = None,
    ) -> None:
        self.plan = compressor.plan
        self.shadow = settings.shadow and self.plan.codec != "none"
        self._engine = engine
        self._control = control
        self._settings = settings
        self._replanner = replanner
        self._compressor = compressor
        self._parameters = dict(engine.module.named_parameters())
        self._checks = 0
        self._plug = plug
        self._guards = GroupGuards(control, settings.max_relative_error, settings.on_alarm, settings.shadow)
        self._steps = Steps(
            compressor, lambda: float(getattr(engine.optimizer, "loss_scale", 1.0)), control, self._sample
        )
        self._native = NativeReducer(plug.group, self._steps)
        self._ours: Reducer | None = None
        self._transport: ProcessGroupTransport | None = None
        self._is_plugged = False
        self._accumulates = False  # this engine.step() was one of several before an optimizer step
        self._samples = False
        self._is_closed = False
        self._start()
        self._native_step = engine.step
        files = CheckpointFiles(engine, self, control)
        self._replaced = {
            "step": self._step,
            "save_checkpoint": files.save_checkpoint,
            "load_checkpoint": files.load_checkpoint,
        }
        for name, method in self._replaced.items():
            setattr(engine, name, method)

    def _start(self) -> None:
        """Makes ready what carries the plan out; all ranks call it together, as they make a group when first needed."""
        if self._compresses and self._ours is None:
            if self.shadow:
                self._ours = ShadowReducer(self._compressor, self._plug.group, self._steps)
            else:
                self._transport = self._control.sibling()
                self._ours = CompressedReducer(self._compressor, self._transport, self._steps)
        if self._compresses:
            self._guards.watch(self._compressor, self.plan.bits if self._replanner is not None else "")
        else:
            self._guards.rest()
        self._prepare()

    def _prepare(self) -> None:
        """Before a step: puts in place what is to sum its gradients up, or gives DeepSpeed its own methods back.

        Under the plan "none" those are DeepSpeed's; but in a step that a look is to follow, or that takes residuals
        along, DeepSpeed's collectives are called from here.
        """
        is_on = self._guards.off is None and self._control.world_size > 1 and not self._is_closed
        self._samples = self._replans and is_on and self._is_due(self._engine.global_steps + 1)
        residuals = self._compressor.residuals
        reducer = self._ours if self._compresses else None
        if reducer is None and (self._samples or (residuals is not None and residuals.draining)):
            reducer = self._native
        if reducer is not None and is_on:
            self._plug.reducer = reducer
        self._plug_in(reducer is not None and is_on)

    def _go_over(self, chosen: ChosenPlan) -> None:
        """Goes over to a plan between two steps; on all ranks together. Statistics go on."""
        assert self._replanner is not None
        plan, before = self._replanner.plan(chosen), self.plan.facts()
        self.plan = plan
        if plan.facts() == before:
            self._compressor.plan = plan  # another reason at most
            return
        go_over(self._compressor, plan, lambda kept: gather_json(kept, self._control))
        self._start()

    def disable(self, reason: str) -> None:
        """Turns compression off on all ranks: from then on gradients go by DeepSpeed's own collectives.

        One rank is enough. It takes effect on all ranks at once, after the next comparison of their parameters: the
        next optimizer step whose number is a multiple of check_every, or the next `check()`. It is logged on all
        ranks, told by `stats()["disabled"]`, and kept in checkpoints. What error feedback had kept until then is not
        sent any more.
        """
        if not self._compresses and not self._replans:
            _log.warning("there is nothing to disable: gradients are not compressed")
        else:
            self._guards.wish(reason)

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.

        Returns bits, codec, reason, scale, error_feedback, kernel, exact, shadow, world_size, transport, hierarchy
        (None), checks, bytes_source, disabled, alarms, plans, looks, and `summary` of the meter, as DDP's
        `Compression.stats` does. A step is one optimizer step, skipped ones included. With reduce_scatter, raw_bytes is
        what the identity codec would send to the owners, about half of an all-reduce. bytes_source is "counted",
        "shadow", or where nothing was compressed yet "analytic": 2 (n − 1) / n of the gradients' bytes for every
        all-reduce of them that DeepSpeed makes, as are native_bytes after `disable` and under the plan "none".
        """
        state = self._compressor.meter_state()
        if all_ranks:
            state = combined(gather_json(state, self._control))
        native = self.plan.codec == "none"
        figures, residuals = summary(state), self._compressor.residuals
        if residuals is not None:
            norms = {name: residuals.norm(name) for name in figures["parameters"]}
            everyone = gather_json(norms, self._control) if all_ranks else [norms]
            for name, row in figures["parameters"].items():
                row["residual_norm"] = math.hypot(*(theirs[name] for theirs in everyone))
        return {
            "bits": self.plan.bits,
            "codec": self.plan.codec,
            "reason": self.plan.reason,
            "scale": self.plan.scale,
            "messages": "bounded" if self.plan.is_bounded else "exact",
            "error_feedback": self.plan.error_feedback,
            "kernel": "none" if native else self._compressor.codec.kernel_for(self._control.device),
            "exact": self._compressor.exact,
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "transport": PROCESS_GROUP,
            "hierarchy": None,
            "checks": self._checks,
            "bytes_source": self._bytes_source(),
            "disabled": self._guards.off,
            "alarms": self._guards.alarms,
            "plans": self.plans,
            "looks": self._replanner.looks if self._replanner else 0,
            **figures,
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged.

        With bits="auto" the plan may change here: what is decided holds from the next step on, on all ranks. Among the
        passes that are accumulated for one optimizer step nothing is decided.
        """
        is_between_steps = not self._accumulates and not self._steps.is_summing
        self._check(self._parameters, decides=is_between_steps and not self._is_closed)

    def _check(self, parameters: Mapping[str, Tensor], decides: bool = True) -> None:
        planner, meter, step = self._replanner, self._compressor.meter, self._engine.global_steps
        told = self._guards.compare(parameters, step, planner.notes(meter) if planner is not None else ())
        self._checks += bool(parameters)
        if planner is not None and decides and self._guards.off is None:
            if (chosen := planner.judge(told, meter, step)) is not None:
                self._go_over(chosen)
                planner.restarted(meter)
                if self._control.rank == 0:
                    _log.warning("bits auto, from step %d on: %s", step + 1, chosen.reason)
            planner.forget_sample()
        self._prepare()

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
                fix="replan=True and check_every as in the run that is repeated",
            )
        self._replanner.replay([ChosenPlan.from_json(one) for one in plans], until_step)

    @property
    def plans(self) -> list[dict[str, Any]]:
        """With bits="auto" the plans in force so far, as in `stats`, the present one last; else []."""
        return [one.to_json() for one in self._replanner.chosen] if self._replanner else []

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, keyed by parameter name: plain numbers and strings, and with error feedback a float32
        tensor for each parameter. Checkpoints have it already."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "shadow": self.shadow,
            "auto": None if self._replanner is None else {"bits": self.plan.bits, "reason": self.plan.reason},
            "compressor": self._compressor.state_dict(),
            "replanner": self._replanner.state_dict() if self._replanner else None,
            **self._guards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`; with bits="auto" every rank must call it, with its own.

        With bits="auto" a run goes on with the plan it was saved with, whatever this start has measured, which is
        logged, and with the measurements and the allowance for looks that it had. Raises PlanMismatch if it is another
        rank's, of another number of ranks or plan, also where a higher floor_bits excludes the saved one, or if
        residuals would be dropped; CheckpointError if it is of another model.
        """
        planner = self._replanner
        if planner is None:
            self._check_place(state)
        else:
            self._follow_saved(state, planner)
        self._compressor.load_state_dict(state["compressor"])
        self._checks = state["checks"]
        if state["shadow"] != self.shadow:
            self._compressor.start_afresh()
            _log.warning(
                "from a shadow run to a real one, or back: counters and residuals start again from zero"
            )
        self._guards.load_state_dict(state)
        if planner is not None:
            in_force = ChosenPlan(self._engine.global_steps, self.plan.bits, False, self.plan.reason)
            planner.take_up(state.get("replanner"), in_force)
            planner.restarted(self._compressor.meter)
        self._prepare()

    def begin_at(self, step: int) -> None:
        """Counts optimizer steps from here on, for a run that goes on without the state it had; on all ranks.

        What was counted and left out before, with other weights, is forgotten.
        """
        self._compressor.start_afresh()
        self._guards.load_state_dict(self._guards.state_dict())  # their windows begin anew with the meter
        if self._replanner is not None:
            self._replanner.begin_at(step)
            self._replanner.restarted(self._compressor.meter)
        self._prepare()

    def _check_place(self, state: Mapping[str, Any]) -> None:
        place = (state["rank"], state["world_size"])
        if place != (self._control.rank, self._control.world_size):
            raise PlanMismatch(
                "the compression state belongs to another rank",
                expected=f"rank {self._control.rank} of {self._control.world_size}",
                found=f"rank {place[0]} of {place[1]}",
                fix="load every rank's own state; at another number of ranks leave it out",
            )

    def _follow_saved(self, state: Mapping[str, Any], planner: Replanner) -> None:
        """Goes over to the plan of the saved run, if all ranks were given states of the same one."""
        failure: EdlError | None = None
        try:
            self._check_place(state)
        except EdlError as error:
            failure = error
        saved, step = state.get("auto"), self._engine.global_steps
        # Looks are due after the same steps.
        handshake({"checkpoint": {"auto": str(saved), "step": str(step)}}, self._control, failure)
        if saved is None or is_under_floor(saved["bits"], self._settings.floor_bits):
            return
        if saved["bits"] != planner.now.bits and self._control.rank == 0:
            log_saved_plan(saved["bits"], planner.now.bits)
        self._go_over(ChosenPlan(step, saved["bits"], False, saved["reason"]))

    def close(self) -> None:
        """Gives the engine its own methods back, and the process group up; the engine then trains uncompressed."""
        if not self._replaced:
            return
        for name in self._replaced:
            delattr(self._engine, name)
        self._replaced = {}
        self._is_closed = True
        self._plug_in(False)
        if self._transport is not None:
            self._transport.close()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        steps, skipped = engine.global_steps, engine.skipped_steps
        result = self._native_step(*args, **kwargs)
        self._accumulates = engine.global_steps == steps
        if self._accumulates:
            self._steps.passed()
        else:
            self._after_step(applied=engine.skipped_steps == skipped)
        return result

    def _after_step(self, applied: bool) -> None:
        encodes = self._is_plugged and self._compresses
        if not encodes:
            self._count_native()
        with telling_peers(*([] if self._transport is None else [self._transport])):
            self._steps.ended(applied)
        if encodes:
            self._compressor.agree(self._control)
        self._guards.stepped()
        if self._replanner is not None:
            self._replanner.stepped()
        if self._is_due(self._engine.global_steps) and (self._compresses or self._replans):
            self._check(self._parameters if self._compresses else {})
        else:
            self._prepare()

    def _sample(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        if self._samples and self._replanner is not None:
            self._replanner.keep_sample(x, [numel for _, numel, _ in pieces])

    @property
    def _compresses(self) -> bool:
        """Whether the plan does, whatever `disable` may have ended."""
        return self.plan.codec != "none" and self._control.world_size > 1

    @property
    def _replans(self) -> bool:
        return self._replanner is not None and self._replanner.active

    def _is_due(self, step: int) -> bool:
        every = self._settings.check_every
        return bool(every) and step % every == 0

    def _bytes_source(self) -> str:
        if self.shadow:
            return "shadow"
        never = {self.plan.bits, *(one["bits"] for one in self.plans)} == {"none"}
        return "analytic" if never else "counted"

    def _plug_in(self, wanted: bool) -> None:
        if wanted != self._is_plugged:
            (install if wanted else remove)(self._plug)
            self._is_plugged = wanted

    def _count_native(self) -> None:
        engine = self._engine
        trained = {name: p.numel() for name, p in self._parameters.items() if p.requires_grad}
        itemsizes: dict[str, int] = dict.fromkeys(trained, int(engine.communication_data_type.itemsize))
        every_micro_step = engine.zero_optimization_partition_gradients()
        for _ in range(engine.gradient_accumulation_steps() if every_micro_step else 1):
            self._compressor.meter.add(native_tally(trained, itemsizes, self._control.world_size))
