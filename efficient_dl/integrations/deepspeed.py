"""DeepSpeed with entropy-coded gradients: `compress_engine`, and the `EngineCompression` it returns.

ZeRO stages 0, 1 and 2. What is replaced inside the engine, and how, is in deepspeed_plugs.py.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from efficient_dl.comm import (
    Alarm,
    Compressor,
    KillSwitch,
    Plan,
    ProcessGroupTransport,
    Residuals,
    Watch,
    check_equal,
    combined,
    gather_json,
    handshake,
    native_tally,
    summary,
)
from efficient_dl.comm.planner import Decision, PlannerOptions
from efficient_dl.errors import ConfigError, EdlError, PlanMismatch
from efficient_dl.integrations.auto import AutoOptions, decide, note_ignored
from efficient_dl.integrations.ddp_transport import PROCESS_GROUP
from efficient_dl.integrations.deepspeed_checkpoint import METHODS as CHECKPOINT_METHODS
from efficient_dl.integrations.deepspeed_checkpoint import CheckpointFiles
from efficient_dl.integrations.deepspeed_plugs import (
    EnginePlug,
    ZeroPlug,
    check_signatures,
    check_version,
    install,
    remove,
)
from efficient_dl.integrations.deepspeed_reducers import CompressedReducer, ShadowReducer, Steps
from efficient_dl.integrations.deepspeed_settings import Settings, check_supported
from efficient_dl.integrations.facts import common_facts

_log = logging.getLogger(__name__)


def is_engine(model: object) -> bool:
    """Whether it is a DeepSpeedEngine; never imports deepspeed."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)


def compress_engine(
    engine: Any,
    bits: str | float | None = None,
    *,
    check_every: int | None = None,
    timeout: float | None = None,
    kernel: str | None = None,
    scale: str | None = None,
    error_feedback: bool | str | None = None,
    shadow: bool | None = None,
    max_relative_error: float | None = None,
    on_alarm: str | None = None,
    floor_bits: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> EngineCompression:
    """Compresses the gradients that a DeepSpeed engine reduces over its data-parallel ranks.

    Call it once, on every rank, after deepspeed.initialize() and before the first backward pass or load_checkpoint.
    What is not given here is read from the section "efficient_dl" of DeepSpeed's configuration, which has the same
    keys: {"efficient_dl": {"bits": 2.0}}. engine.save_checkpoint and load_checkpoint take the compression state along.

    engine: a DeepSpeedEngine of DeepSpeed 0.19.8 or a later 0.19, with data parallelism and ZeRO stage 0, 1 or 2 over
        float32, bfloat16 or float16 parameters. Gradient accumulation, clipping, loss scaling, overlap_comm,
        contiguous_gradients, reduce_scatter and communication_data_type work as before.
    bits: "none" (DeepSpeed's own collectives, untouched), "identity" (our reductions, uncompressed), "lossless", a
        number of bits a value (2.0), or "auto" (the default): measured for some seconds, as for
        DistributedDataParallel; nothing counts as hidden, because DeepSpeed waits for every reduction.
    check_every: compare all parameters of all ranks, bit by bit, after every so many optimizer steps (50); 0: never, as
        with bits="none".
    timeout: seconds (300) after which an unfinished transfer, the wait for the slowest rank included, raises
        TransportError and names the rank.
    kernel: which kernels code CPU tensors, as in `make_codec`.
    scale: what step sizes follow: "local", "global" or "auto" (the default), as for DistributedDataParallel.
    error_feedback: add what a packet leaves out to the parameter's next one; True, False or "auto" (the default: with
        torch.optim.SGD and global steps). Takes 8 bytes a value on every rank, whatever the stage. A step that
        DeepSpeed skips leaves no trace.
    shadow: DeepSpeed's own collectives, bit for bit; what compression would have sent and erred is only reported.
    max_relative_error, on_alarm: alarms, as for DistributedDataParallel; "disable" also ends compression on all ranks.
    floor_bits: the fewest bits a value that "auto" may choose (2.0).
    extra: further facts that must agree on all ranks; compared as text.

    With stages 1 and 2 and "reduce_scatter": true, as is DeepSpeed's default, gradients travel once: to the rank that
    owns their partition. Transfers do not run beside backward: DeepSpeed reads the sums right after it asks for them.

    Raises ConfigError (stage 3, another DeepSpeed, unsupported features), UnsupportedTensor, PlanMismatch,
    TransportError.

    Example:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        compression = edl.compress(engine, bits=2.0)
    """
    if not is_engine(engine):
        raise ConfigError(
            f"compress_engine() cannot take a {type(engine).__name__}",
            expected="a DeepSpeedEngine",
            fix="engine, *_ = deepspeed.initialize(...); compress_engine(engine)",
        )
    given = {
        "bits": bits,
        "check_every": check_every,
        "timeout": timeout,
        "kernel": kernel,
        "scale": scale,
        "error_feedback": error_feedback,
        "shadow": shadow,
        "max_relative_error": max_relative_error,
        "on_alarm": on_alarm,
        "floor_bits": floor_bits,
    }
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    control = ProcessGroupTransport(engine.seq_data_parallel_group, device, timeout or Settings().timeout)
    facts = _facts(engine, parameters, extra or {})
    try:
        version = sys.modules["deepspeed"].__version__
        check_version(version)
        check_supported(engine)
        settings = Settings.of(engine._config._param_dict, **given)
        plug_class = ZeroPlug if hasattr(engine.optimizer, "average_tensor") else EnginePlug
        owner = engine.optimizer if plug_class is ZeroPlug else engine
        check_signatures(type(owner), plug_class.methods, version)
        check_signatures(type(engine), CHECKPOINT_METHODS | {"step": ("self", "lr_kwargs")}, version)
        if "step" in vars(engine):
            raise ConfigError("the engine is compressed already", fix="call compress_engine() once")
        plan = settings.plan(engine)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        plug = plug_class(engine, names)
        numels = {name: p.numel() for name, p in parameters.items()} | plug.gradient_numels()
        compressor = _compressor(plan, numels, parameters, settings, device)
    except EdlError as error:
        handshake(facts, control, failure=error)
        raise
    control.timeout = float(settings.timeout)
    facts["plan"] = {"bits": plan.bits, **plan.facts()}
    facts["check_every"], facts["shadow"] = settings.check_every, settings.shadow
    facts["alarm"] = {"max_relative_error": settings.max_relative_error, "on_alarm": settings.on_alarm}
    facts["kernel"] = compressor.codec.kernel_for(device).partition("-")[0]
    is_auto = plan.bits == "auto" and not settings.shadow and control.world_size > 1 and bool(parameters)
    facts["auto"] = settings.floor_bits if is_auto else None
    handshake(facts, control)
    if is_auto:
        decision = _decided(engine, plan, plug, parameters, control, settings)
        settings = replace(settings, bits=decision.bits)
        if decision.bits == "none":
            settings = replace(settings, error_feedback="auto")
        plan = replace(settings.plan(engine), reason=decision.reason)
        compressor = _compressor(plan, numels, parameters, settings, device)
    return EngineCompression(engine, compressor, control, plug, settings)


def _compressor(
    plan: Plan,
    numels: Mapping[str, int],
    parameters: Mapping[str, torch.Tensor],
    settings: Settings,
    device: torch.device,
) -> Compressor:
    residuals = Residuals(numels, device) if plan.error_feedback else None
    return Compressor(plan, list(parameters), settings.kernel, residuals)


def _decided(
    engine: Any,
    plan: Plan,
    plug: EnginePlug | ZeroPlug,
    parameters: Mapping[str, torch.Tensor],
    control: ProcessGroupTransport,
    settings: Settings,
) -> Decision:
    """What "auto" means here. DeepSpeed itself all-reduces, also where a sum is needed at its owner alone."""
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    options = AutoOptions(
        settings.floor_bits,
        family="grid" if plan.scale == "global" else "bits",
        kernel=settings.kernel,
        planner=PlannerOptions(bucket_bytes=size, one_way=plug.sums_at_owners),
    )
    _, decision = decide(parameters, control, control, None, options)
    ignored = note_ignored(error_feedback=settings.error_feedback is True) if decision.bits == "none" else ""
    return replace(decision, reason=decision.reason + ignored)


class EngineCompression:
    """Compressed reduction of one engine's gradients, as `compress_engine` set it up."""

    def __init__(
        self,
        engine: Any,
        compressor: Compressor,
        control: ProcessGroupTransport,
        plug: EnginePlug | ZeroPlug,
        settings: Settings,
    ) -> None:
        self.plan = compressor.plan
        self.shadow = settings.shadow and self.plan.codec != "none"
        self._engine = engine
        self._compressor = compressor
        self._control = control
        self._settings = settings
        self._parameters = dict(engine.module.named_parameters())
        self._checks = 0
        self._transport: ProcessGroupTransport | None = None
        self._plug = plug
        self._is_plugged = False
        self._steps = Steps(compressor, lambda: float(getattr(engine.optimizer, "loss_scale", 1.0)))
        self._switch = KillSwitch()
        self._watch: Watch | None = None
        self._compares = self.plan.codec != "none" and control.world_size > 1
        if self._compares:
            if self.shadow:
                plug.reducer = ShadowReducer(compressor, plug.group, self._steps)
            else:
                self._transport = control.sibling()
                plug.reducer = CompressedReducer(compressor, self._transport, self._steps)
            self._plug_in(True)
            self._watch = Watch(
                compressor.meter,
                settings.max_relative_error,
                times=not self.shadow and self.plan.codec != "identity",
                exact=compressor.exact,
                escapes_are_usual=self.plan.codec.startswith("grid:"),
            )
        self._native_step = engine.step
        files = CheckpointFiles(engine, self, control)
        self._replaced = {
            "step": self._step,
            "save_checkpoint": files.save_checkpoint,
            "load_checkpoint": files.load_checkpoint,
        }
        for name, method in self._replaced.items():
            setattr(engine, name, method)

    def disable(self, reason: str) -> None:
        """Turns compression off on all ranks: from then on gradients go by DeepSpeed's own collectives.

        One rank is enough. It takes effect on all ranks at once, after the next comparison of their parameters: the
        next optimizer step whose number is a multiple of check_every, or the next `check()`. It is logged on all
        ranks, told by `stats()["disabled"]`, and kept in checkpoints.
        """
        if not self._compares:
            _log.warning("there is nothing to disable: gradients are not compressed")
        elif self._switch.off is None:
            self._switch.wish = self._switch.wish or reason
            _log.warning("compression ends with the next comparison of parameters: %s", reason)

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
            "error_feedback": self.plan.error_feedback,
            "kernel": "none" if native else self._compressor.codec.kernel_for(self._control.device),
            "exact": self._compressor.exact,
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "transport": PROCESS_GROUP,
            "hierarchy": None,
            "checks": self._checks,
            "bytes_source": "analytic" if native else "shadow" if self.shadow else "counted",
            "disabled": self._switch.off,
            "alarms": self._watch.state_dict() if self._watch else [],
            **figures,
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged."""
        step = self._engine.global_steps
        notes = [int(self._switch.wish is not None), *(self._watch.notes() if self._watch else ())]
        everyone = check_equal(self._parameters, self._control, step, notes)
        self._checks += 1
        self._switch.agree([bool(theirs[0]) for theirs in everyone], self._control, step)
        if self._watch is not None and self._switch.off is None:
            for alarm in self._watch.judge([theirs[1:] for theirs in everyone]):
                self._log_alarm(alarm)
                if self._disables_on_alarm:
                    self._switch.end(alarm.text, step)
        self._follow_switch()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, keyed by parameter name: plain numbers and strings, and with error feedback a float32
        tensor for each parameter. Checkpoints have it already."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "shadow": self.shadow,
            "compressor": self._compressor.state_dict(),
            "switch": self._switch.state_dict(),
            "alarms": self._watch.state_dict() if self._watch else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`.

        Raises PlanMismatch if it is another rank's, of another number of ranks or plan; CheckpointError if it is of
        another model.
        """
        place = (state["rank"], state["world_size"])
        if place != (self._control.rank, self._control.world_size):
            raise PlanMismatch(
                "the compression state belongs to another rank",
                expected=f"rank {self._control.rank} of {self._control.world_size}",
                found=f"rank {place[0]} of {place[1]}",
                fix="load every rank's own state; at another number of ranks leave it out",
            )
        fresh = self._compressor.meter.state_dict()
        self._compressor.load_state_dict(state["compressor"])
        self._checks = state["checks"]
        if state["shadow"] != self.shadow:
            self._compressor.start_afresh(fresh)
            _log.warning(
                "from a shadow run to a real one, or back: counters and residuals start again from zero"
            )
        if self._watch is not None:
            self._watch.load_state_dict(state["alarms"])
        self._switch.load_state_dict(state["switch"])
        self._follow_switch()

    def close(self) -> None:
        """Gives the engine its own methods back, and the process group up; the engine then trains uncompressed."""
        if not self._replaced:
            return
        for name in self._replaced:
            delattr(self._engine, name)
        self._replaced = {}
        self._plug_in(False)
        if self._transport is not None:
            self._transport.close()

    @property
    def _disables_on_alarm(self) -> bool:
        return self._settings.on_alarm == "disable" and not self.shadow

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
        if self._watch is not None and self._switch.off is None:
            for alarm in self._watch.stepped():
                self._log_alarm(alarm)
                if self._disables_on_alarm:
                    self.disable(alarm.text)
        every = self._settings.check_every
        if self._compares and every and self._engine.global_steps % every == 0:
            self.check()

    def _log_alarm(self, alarm: Alarm) -> None:
        _log.warning("rank %d, step %d: %s", self._control.rank, alarm.step, alarm.text)

    def _follow_switch(self) -> None:
        if self._compares:
            self._plug_in(self._switch.off is None)

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


def _facts(engine: Any, parameters: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> dict[str, Any]:
    zero = engine._config.zero_config
    return {
        **common_facts(parameters, extra),
        "deepspeed": sys.modules["deepspeed"].__version__,
        "zero stage": int(engine.zero_optimization_stage()),
        "reduce_scatter": bool(zero.reduce_scatter),
        "reduce_bucket_size": int(zero.reduce_bucket_size),
        "communication_data_type": str(engine.communication_data_type),
        "group": dist.get_process_group_ranks(engine.seq_data_parallel_group),
    }
