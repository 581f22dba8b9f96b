"""The `EngineCompression` of a DeepSpeed engine: its collectives, its statistics and its state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from efficient_dl.comm import (
    Compressor,
    ProcessGroupTransport,
    check_equal,
    combined,
    gather_json,
    handshake,
    native_tally,
    summary,
)
from efficient_dl.errors import EdlError, PlanMismatch
from efficient_dl.integrations.auto import is_under_floor, log_saved_plan
from efficient_dl.integrations.ddp_transport import PROCESS_GROUP
from efficient_dl.integrations.deepspeed_checkpoint import CheckpointFiles
from efficient_dl.integrations.deepspeed_plugs import EnginePlug, ZeroPlug, install, remove
from efficient_dl.integrations.deepspeed_reducers import CompressedReducer, ShadowReducer, Steps
from efficient_dl.integrations.deepspeed_settings import Settings
from efficient_dl.integrations.group_guards import GroupGuards

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Automatic:
    """What "auto" chose at this start, and how a run that was saved with another choice goes on with that one.

    compressor: of bits and a reason.
    """

    bits: str
    floor_bits: float
    compressor: Callable[[str, str], Compressor]


class EngineCompression:
    """Compressed reduction of one engine's gradients, as `compress_engine` set it up."""

    def __init__(
        self,
        engine: Any,
        compressor: Compressor,
        control: ProcessGroupTransport,
        plug: EnginePlug | ZeroPlug,
        settings: Settings,
        automatic: Automatic | None = None,
    ) -> None:
        self._engine = engine
        self._control = control
        self._settings = settings
        self._automatic = automatic
        self._parameters = dict(engine.module.named_parameters())
        self._checks = 0
        self._plug = plug
        self._guards = GroupGuards(control, settings.max_relative_error, settings.on_alarm, settings.shadow)
        self._start(compressor)
        self._native_step = engine.step
        files = CheckpointFiles(engine, self, control)
        self._replaced = {
            "step": self._step,
            "save_checkpoint": files.save_checkpoint,
            "load_checkpoint": files.load_checkpoint,
        }
        for name, method in self._replaced.items():
            setattr(engine, name, method)

    def _start(self, compressor: Compressor) -> None:
        """Plugs in what carries the compressor's plan out, with a group of its own, which all ranks make together."""
        engine, settings = self._engine, self._settings
        self.plan = compressor.plan
        self.shadow = settings.shadow and self.plan.codec != "none"
        self._compressor = compressor
        self._transport: ProcessGroupTransport | None = None
        self._is_plugged = False
        self._steps = Steps(compressor, lambda: float(getattr(engine.optimizer, "loss_scale", 1.0)))
        self._compares = self.plan.codec != "none" and self._control.world_size > 1
        if self._compares:
            if self.shadow:
                self._plug.reducer = ShadowReducer(compressor, self._plug.group, self._steps)
            else:
                self._transport = self._control.sibling()
                self._plug.reducer = CompressedReducer(compressor, self._transport, self._steps)
            self._plug_in(True)
            self._guards.watch(compressor, self.plan.bits if self._automatic else "")
        else:
            self._guards.rest()

    def _stop(self) -> None:
        self._plug_in(False)
        if self._transport is not None:
            self._transport.close()

    def disable(self, reason: str) -> None:
        """Turns compression off on all ranks: from then on gradients go by DeepSpeed's own collectives.

        One rank is enough. It takes effect on all ranks at once, after the next comparison of their parameters: the
        next optimizer step whose number is a multiple of check_every, or the next `check()`. It is logged on all
        ranks, told by `stats()["disabled"]`, and kept in checkpoints.
        """
        if not self._compares:
            _log.warning("there is nothing to disable: gradients are not compressed")
        else:
            self._guards.wish(reason)

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.

        Returns bits, codec, reason, scale, error_feedback, kernel, exact, shadow, world_size, transport, hierarchy
        (None), checks, bytes_source, disabled, alarms, and `summary` of the meter, as DDP's `Compression.stats` does.
        A step is one optimizer step, skipped ones included. With reduce_scatter, raw_bytes is what the identity codec
        would send to the owners, about half of an all-reduce. bytes_source is "counted", "shadow", or with bits="none"
        "analytic": 2 (n − 1) / n of the gradients' bytes for every all-reduce of them that DeepSpeed makes, as are
        native_bytes after `disable`.
        """
        state = self._compressor.meter.state_dict()
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
            "bytes_source": "analytic" if native else "shadow" if self.shadow else "counted",
            "disabled": self._guards.off,
            "alarms": self._guards.alarms,
            **figures,
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged."""
        step = self._engine.global_steps
        self._guards.agree(check_equal(self._parameters, self._control, step, self._guards.notes()), step)
        self._checks += 1
        self._follow_switch()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, keyed by parameter name: plain numbers and strings, and with error feedback a float32
        tensor for each parameter. Checkpoints have it already."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "shadow": self.shadow,
            "auto": None if self._automatic is None else {"bits": self.plan.bits, "reason": self.plan.reason},
            "compressor": self._compressor.state_dict(),
            **self._guards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`; with bits="auto" every rank must call it, with its own.

        With bits="auto" a run goes on with the plan it was saved with, whatever this start has measured, which is
        logged. Raises PlanMismatch if it is another rank's, of another number of ranks or plan, also where a higher
        floor_bits excludes the saved one; CheckpointError if it is of another model.
        """
        if self._automatic is None:
            self._check_place(state)
        else:
            self._follow_saved(state, self._automatic)
        fresh = self._compressor.meter.state_dict()
        self._compressor.load_state_dict(state["compressor"])
        self._checks = state["checks"]
        if state["shadow"] != self.shadow:
            self._compressor.start_afresh(fresh)
            _log.warning(
                "from a shadow run to a real one, or back: counters and residuals start again from zero"
            )
        self._guards.load_state_dict(state)
        self._follow_switch()

    def _check_place(self, state: Mapping[str, Any]) -> None:
        place = (state["rank"], state["world_size"])
        if place != (self._control.rank, self._control.world_size):
            raise PlanMismatch(
                "the compression state belongs to another rank",
                expected=f"rank {self._control.rank} of {self._control.world_size}",
                found=f"rank {place[0]} of {place[1]}",
                fix="load every rank's own state; at another number of ranks leave it out",
            )

    def _follow_saved(self, state: Mapping[str, Any], automatic: Automatic) -> None:
        """Goes over to the plan of the saved run, if all ranks were given states of the same one."""
        failure: EdlError | None = None
        try:
            self._check_place(state)
        except EdlError as error:
            failure = error
        saved = state.get("auto")
        handshake({"checkpoint": {"auto": str(saved)}}, self._control, failure)
        if saved is None or is_under_floor(saved["bits"], automatic.floor_bits):
            return
        if saved["bits"] != automatic.bits and self._control.rank == 0:
            log_saved_plan(saved["bits"], automatic.bits)
        if saved["bits"] != self.plan.bits:
            self._stop()
            self._start(automatic.compressor(saved["bits"], saved["reason"]))

    def close(self) -> None:
        """Gives the engine its own methods back, and the process group up; the engine then trains uncompressed."""
        if not self._replaced:
            return
        for name in self._replaced:
            delattr(self._engine, name)
        self._replaced = {}
        self._stop()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        steps, skipped = engine.global_steps, engine.skipped_steps
        result = self._native_step(*args, **kwargs)
        if engine.global_steps > steps:
            self._after_step(applied=engine.skipped_steps == skipped)
        return result

    def _after_step(self, applied: bool) -> None:
        if not self._is_plugged:
            self._count_native()
        self._steps.ended(applied)
        if self._is_plugged:
            self._compressor.agree(self._control)
        self._guards.stepped()
        every = self._settings.check_every
        if self._compares and every and self._engine.global_steps % every == 0:
            self.check()

    def _follow_switch(self) -> None:
        if self._compares:
            self._plug_in(self._guards.off is None)

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
