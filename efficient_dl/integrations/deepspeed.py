"""DeepSpeed with entropy-coded gradients: `compress_engine`.

ZeRO stages 0, 1 and 2. What is replaced inside the engine, and how, is in deepspeed_plugs.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from efficient_dl.comm import Compressor, Plan, ProcessGroupTransport, Residuals, handshake
from efficient_dl.comm.planner import PlannerOptions
from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.integrations.auto import AutoOptions, decide, note_ignored, of_one_dtype, shapes_of
from efficient_dl.integrations.ddp_replanning import Replanner
from efficient_dl.integrations.deepspeed_checkpoint import METHODS as CHECKPOINT_METHODS
from efficient_dl.integrations.deepspeed_compression import EngineCompression
from efficient_dl.integrations.deepspeed_plugs import EnginePlug, ZeroPlug, check_signatures, check_version
from efficient_dl.integrations.deepspeed_settings import Settings, check_supported
from efficient_dl.integrations.facts import common_facts
from efficient_dl.integrations.plan_watch import ChosenPlan, ReplanOptions, Sample

_log = logging.getLogger(__name__)


def is_engine(model: object) -> bool:
    """Whether it is a DeepSpeedEngine; never imports deepspeed."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)


def check_is_own(engine: Any, optimizer: object) -> None:
    """Raises ConfigError unless the engine steps this optimizer: the one it was given, or the one it made of it."""
    names = ("optimizer", "basic_optimizer", "client_optimizer")
    if all(getattr(engine, name, None) is not optimizer for name in names):
        raise ConfigError(
            "a DeepSpeed engine has its own optimizer, and this is another one",
            found=type(optimizer).__name__,
            fix="compress(engine, bits=...)",
        )


def compress_engine(
    engine: Any,
    bits: str | float | None = None,
    *,
    check_every: int | None = None,
    timeout: float | None = None,
    kernel: str | None = None,
    scale: str | None = None,
    messages: str | None = None,
    error_feedback: bool | str | None = None,
    shadow: bool | None = None,
    max_relative_error: float | None = None,
    on_alarm: str | None = None,
    floor_bits: float | None = None,
    replan: bool | ReplanOptions | None = None,
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
    messages: "exact" (the default), or "bounded": of a length that the number of bits says, as for
        DistributedDataParallel.
    error_feedback: add what a packet leaves out to the parameter's next one; True, False or "auto" (the default: with
        torch.optim.SGD and global steps). Takes 8 bytes a value on every rank, whatever the stage. A step that
        DeepSpeed skips leaves no trace.
    shadow: DeepSpeed's own collectives, bit for bit; what compression would have sent and erred is only reported.
    max_relative_error, on_alarm: alarms, as for DistributedDataParallel; "disable" also ends compression on all ranks.
    floor_bits: the fewest bits a value that "auto" may choose (2.0).
    replan: for "auto": look again during the run, for at most 0.5 % of the time, and go over to what pays by then, on
        all ranks after the same optimizer step (docs/planner.md); True (the default), False or ReplanOptions. It looks
        where parameters are compared, so it needs check_every.
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
        "messages": messages,
        "error_feedback": error_feedback,
        "shadow": shadow,
        "max_relative_error": max_relative_error,
        "on_alarm": on_alarm,
        "floor_bits": floor_bits,
        "replan": replan,
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
        plan.check_messages()
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
    told = {"floor_bits": settings.floor_bits, "replan": str(settings.replan)}
    facts["auto"] = told if is_auto else None
    handshake(facts, control)
    replanner = None
    if is_auto:

        def meant(choice: ChosenPlan) -> Plan:
            """The user's wishes with the bits that were chosen; DeepSpeed's own collectives feed nothing back."""
            feedback = "auto" if choice.bits == "none" else settings.error_feedback
            plan = replace(settings, bits=choice.bits, error_feedback=feedback).plan(engine)
            return replace(plan, reason=choice.reason)

        feeds = replace(settings, bits=settings.floor_bits).plan(engine).error_feedback
        replanner = _replanner(plan, plug, parameters, control, settings, feeds, meant)
        compressor.follow(meant(replanner.now))
    return EngineCompression(engine, compressor, control, plug, settings, replanner)


def _compressor(
    plan: Plan,
    numels: Mapping[str, int],
    parameters: Mapping[str, torch.Tensor],
    settings: Settings,
    device: torch.device,
) -> Compressor:
    residuals = Residuals(numels, device) if plan.error_feedback else None
    return Compressor(plan, list(parameters), settings.kernel, residuals)


def _replanner(
    plan: Plan,
    plug: EnginePlug | ZeroPlug,
    parameters: Mapping[str, torch.Tensor],
    control: ProcessGroupTransport,
    settings: Settings,
    feeds_back: bool,
    meant: Callable[[ChosenPlan], Plan],
) -> Replanner:
    """What "auto" means here, now and later. DeepSpeed itself all-reduces, also where one rank alone needs a sum."""
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    auto = AutoOptions(
        settings.floor_bits,
        family="grid" if plan.scale == "global" else "bits",
        feeds_back=feeds_back,
        kernel=settings.kernel,
        planner=PlannerOptions(bucket_bytes=size, one_way=plug.sums_at_owners),
    )
    measured, decision = decide(parameters, control, control, None, auto)
    if decision.bits == "none":
        ignored = note_ignored(error_feedback=settings.error_feedback is True)
        decision = replace(decision, reason=decision.reason + ignored)
    options = settings.replan_options
    if settings.replan is True and not options.active and control.rank == 0:
        _log.warning("bits auto: planned once, for want of check_every")
    model = shapes_of(parameters)
    sample = Sample(sum(p.numel() for p in of_one_dtype(parameters)))
    return Replanner(measured, decision, model, auto, meant, control, control, None, sample, options)


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
