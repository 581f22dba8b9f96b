"""FSDP2 with entropy-coded gradients and weights: `compress_fsdp`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from efficient_dl.comm import (
    DEFAULT_TIMEOUT_SECONDS,
    Compressor,
    OnAlarm,
    Plan,
)
from efficient_dl.comm.plan import Messages
from efficient_dl.comm.planner import DEFAULT_FLOOR_BITS
from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.integrations.alarm_options import check_alarms
from efficient_dl.integrations.auto import AutoOptions
from efficient_dl.integrations.facts import common_facts
from efficient_dl.integrations.feedback import is_asked_for
from efficient_dl.integrations.fsdp_auto import WEIGHTS, Automatic, Chosen, choose
from efficient_dl.integrations.fsdp_compression import FsdpCompression
from efficient_dl.integrations.fsdp_setup import (
    REPLICATE,
    SHARD,
    AxisWish,
    agree,
    check_replicas,
    check_supported,
    lane_key,
    lanes_of,
)
from efficient_dl.integrations.fsdp_units import Unit, units_of
from efficient_dl.integrations.plan_watch import ReplanOptions

_log = logging.getLogger(__name__)


def compress_fsdp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float = "auto",
    *,
    weights: str | float | None = None,
    axes: Mapping[str, str | float] | None = None,
    overrides: Mapping[str, str | float] | None = None,
    max_error: float | None = None,
    bytes_per_step: int | None = None,
    error_feedback: bool | str = False,
    messages: Messages = "exact",
    scaler: torch.amp.GradScaler | None = None,
    shadow: bool = False,
    check_every: int = 50,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    kernel: str = "auto",
    extra: Mapping[str, Any] | None = None,
    max_relative_error: float | None = None,
    on_alarm: OnAlarm = "warn",
    floor_bits: float = DEFAULT_FLOOR_BITS,
    backward_seconds: float = 0.0,
    replan: bool | ReplanOptions = True,
) -> FsdpCompression:
    """Compresses what FSDP2 reduce-scatters, all-reduces and all-gathers, for every module that it has sharded.

    `compress` comes here with a model to which fully_shard was applied. Call it once, on every rank, after all
    fully_shard calls and before the first forward pass. Arguments that are not named here are those of `compress_ddp`.

    bits: as for DistributedDataParallel. "auto" measures each axis of the mesh by itself (docs/planner.md).
    weights: what all-gathers carry, as bits; "lossless" gives torch's own bits. Weights are encoded once after each
        step of the optimizer and sent again from the same packet in backward. None: "lossless", or with bits="auto"
        "lossless" or "none", by what was measured.
    axes: bits of gradients on one axis of a mesh of replicas x shards (HSDP), instead of `bits`, which both take:
        {"shard": "none"} leaves the reduce-scatter, mostly inside a node, to torch, and {"shard": "identity"} makes
        our own of it, in full precision; only the slow axis between the replicas is then compressed. {"replicate":
        "none"} leaves the replicas to torch. Tensor-parallel and other axes are not touched.
    bytes_per_step: of both axes, apportioned by values sent; of the one that `axes` does not name, if it names one.
    error_feedback: add what a packet leaves out to the next one of the same values; True or False (the default, which
        "auto" means here). On the shard axis it takes 8
        bytes a value of the whole, unsharded model on every rank, because a rank contributes to every shard; on the
        replicate axis 8 bytes a value of the own shard.
    messages: as for DistributedDataParallel; "bounded" where a plan allows it: the reduce-scatter of 2.0 bits, not the
        all-gather of lossless weights.
    replan: for "auto": look again during the run, for at most 0.5 % of the time, at each axis and the weights by
        itself, and go over to what pays by then, on all ranks after the same step (docs/planner.md); where parameters
        are compared, so it needs an optimizer and check_every, and all modules on one mesh.

    Gradients are decoded and summed in float32 in rank order, the own contribution unquantized, and stay on their
    rank: on the shard axis a value is rounded by the codec once. Between replicas a shard is all-reduced as DDP's
    buckets are, and all replicas get the same bits. On a CPU reductions and prefetched gathers run beside backward,
    which torch alone does not do there. Mixed precision, gradient accumulation (with set_requires_gradient_sync or
    set_requires_all_reduce), clipping, frozen and unused parameters and uneven shards work as before.

    Raises ConfigError, UnsupportedTensor, PlanMismatch (ranks differ), TransportError; EdlError if this torch reduces
    between replicas in another way than the versions we know.
    """
    if not isinstance(model, FSDPModule):
        raise ConfigError(
            f"compress_fsdp() cannot take a {type(model).__name__}",
            expected="a model to which torch.distributed.fsdp.fully_shard was applied",
            fix="fully_shard(model) first",
        )
    units = units_of(model)
    lanes = lanes_of(units, timeout)
    controls = [control for lane in lanes.values() for control in lane.controls]
    facts = common_facts(dict(model.named_parameters()), extra or {})
    facts["check_every"] = check_every if optimizer else 0
    facts["shadow"] = shadow
    facts["alarm"] = {"max_relative_error": max_relative_error, "on_alarm": on_alarm}
    facts["modules"] = {str(number): " ".join(unit.names) for number, unit in enumerate(units)}
    try:
        feedback = is_asked_for(error_feedback, scaler, optimizer)
        wish = AxisWish(bits, axes or {}, overrides, max_error, bytes_per_step, feedback, messages)
        auto = AutoOptions(floor_bits, backward_seconds, feeds_back=feedback, kernel=kernel)
        auto.check()
        measured = [] if shadow else wish.automatic(units)
        measured += [WEIGHTS] if measured and weights is None else []
        check_supported(units, model, wish, check_every)
        check_alarms(max_relative_error, on_alarm, optimizer, check_every)
        why_once = _why_planned_once(units, len(lanes), wish, check_every if optimizer else 0)
        if isinstance(replan, ReplanOptions) and replan.active and why_once:
            raise ConfigError(
                "plans cannot change during this run",
                expected="an optimizer, check_every above 0, and all modules on one mesh",
                found=why_once,
                fix="compress(model, optimizer), or replan=False",
            )
        names = list(dict.fromkeys(name for unit in units for name in unit.names))
        by_axis = wish.compressors(units, names, kernel)
        weights_plan = replace(Plan.of("lossless" if weights is None else weights), messages=messages)
        if by_axis[REPLICATE].plan.codec != "none":
            check_replicas(units)
    except EdlError as error:
        agree(facts, controls, error)
        raise
    facts["auto"] = {**auto.facts(), "replan": str(replan)} if measured else None
    compressors = _compressors(by_axis, Compressor(weights_plan, names, kernel))
    facts |= _plan_facts(compressors, units[0].device)
    agree(facts, controls, None)

    def wishes(chosen: Chosen) -> tuple[AxisWish, Plan]:
        """The user's wishes with what was chosen: of gradients, and the plan of weights."""
        plan = weights_plan
        if WEIGHTS in chosen.bits:
            plan = replace(Plan.of(chosen.bits[WEIGHTS]), reason=chosen.reasons[WEIGHTS], messages=messages)
        return wish.decided(chosen.bits, chosen.reasons), plan

    def plans_of(chosen: Chosen) -> dict[str, Plan]:
        gradients, plan = wishes(chosen)
        by_axis = gradients.compressors(units, names, kernel)
        return {key: one.plan for key, one in _compressors(by_axis, Compressor(plan, names, kernel)).items()}

    automatic, options = None, ReplanOptions(active=False)
    if measured:
        chosen, planned = choose(units, list(lanes.values()), measured, auto)
        gradients, plan = wishes(chosen)
        compressors = _compressors(
            gradients.compressors(units, names, kernel), Compressor(plan, names, kernel)
        )
        automatic = Automatic(chosen, floor_bits, plans_of, planned)
        agree(facts | _plan_facts(compressors, units[0].device), controls, None)
        options = (
            replan if isinstance(replan, ReplanOptions) else ReplanOptions(active=replan and not why_once)
        )
        if replan and why_once and dist.get_rank() == 0:
            _log.warning("bits auto: planned once, because of %s", why_once)
    return FsdpCompression(
        units,
        [lanes[lane_key(unit)] for unit in units],
        optimizer,
        compressors,
        automatic,
        check_every=check_every,
        scaler=scaler,
        shadow=shadow,
        max_relative_error=max_relative_error,
        on_alarm=on_alarm,
        replan=options,
    )


def _why_planned_once(units: Sequence[Unit], lanes: int, wish: AxisWish, check_every: int) -> str:
    """Why plans cannot change during the run; "" if they can. check_every: 0 without an optimizer."""
    if not check_every:
        return "no optimizer, or check_every=0"
    if lanes > 1:
        return "modules on several meshes"
    has_replicas = any(unit.replicas is not None for unit in units)
    if wish.error_feedback and has_replicas and any(u.gradient_dtype == torch.float16 for u in units):
        # torch divides float16 before and after, by other numbers where it reduces between replicas itself.
        return "error feedback of float16 gradients between replicas"
    return ""


def _compressors(by_axis: Mapping[str, Compressor], weights: Compressor) -> dict[str, Compressor]:
    return {"gradients": by_axis[SHARD], "replicas": by_axis[REPLICATE], "weights": weights}


def _plan_facts(compressors: Mapping[str, Compressor], device: torch.device) -> dict[str, Any]:
    keys = {"plan": "gradients", "replicas": "replicas", "weights": "weights"}
    plans = {key: compressors[name].plan for key, name in keys.items()}
    facts: dict[str, Any] = {key: {"bits": plan.bits, **plan.facts()} for key, plan in plans.items()}
    return facts | {"kernel": compressors["gradients"].codec.kernel_for(device).partition("-")[0]}
