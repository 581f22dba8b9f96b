"""DistributedDataParallel with entropy-coded gradients: `compress_ddp`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import (
    DEFAULT_TIMEOUT_SECONDS,
    Compressor,
    Levels,
    OnAlarm,
    Plan,
    ProcessGroupTransport,
    Transport,
    handshake,
)
from efficient_dl.comm.capacity import knows_capacity
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.plan import Messages, Scale
from efficient_dl.comm.planner import DEFAULT_FLOOR_BITS
from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.integrations.alarm_options import check_alarms
from efficient_dl.integrations.auto import (
    AutoOptions,
    bucket_bytes,
    bucket_copies,
    decide,
    note_ignored,
    of_one_dtype,
    shapes_of,
)
from efficient_dl.integrations.ddp_compression import Compression
from efficient_dl.integrations.ddp_native import left_to_torch
from efficient_dl.integrations.ddp_replanning import Replanner, flat
from efficient_dl.integrations.ddp_setup import (
    averaged_parameters,
    check_hierarchy,
    check_supported,
    make_residuals,
    values_sent,
)
from efficient_dl.integrations.ddp_transport import check_transport, make_transport, transport_name
from efficient_dl.integrations.facts import common_facts
from efficient_dl.integrations.feedback import automatic_scale, feeds_if_lossy, is_asked_for
from efficient_dl.integrations.group_guards import GroupGuards
from efficient_dl.integrations.nodes import Hierarchy, NodesWish, ways
from efficient_dl.integrations.plan_watch import ChosenPlan, ReplanOptions, Sample
from efficient_dl.integrations.second_moment import SecondMoment

_log = logging.getLogger(__name__)


def compress_ddp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float = "auto",
    *,
    overrides: Mapping[str, str | float] | None = None,
    max_error: float | None = None,
    bytes_per_step: int | None = None,
    error_feedback: bool | Literal["auto"] = "auto",
    scale: Scale | Literal["auto"] = "auto",
    messages: Messages | Literal["auto"] = "auto",
    scaler: torch.amp.GradScaler | None = None,
    shadow: bool = False,
    group: dist.ProcessGroup | None = None,
    transport: Transport | Literal["mpi"] | None = None,
    check_every: int = 50,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    kernel: str = "auto",
    extra: Mapping[str, Any] | None = None,
    hierarchy: Hierarchy = None,
    max_relative_error: float | None = None,
    on_alarm: OnAlarm = "warn",
    floor_bits: float = DEFAULT_FLOOR_BITS,
    backward_seconds: float = 0.0,
    replan: bool | ReplanOptions = True,
    measurements: Measurements | None = None,
) -> Compression:
    """Compresses the gradients that a DistributedDataParallel model averages over its ranks.

    Call it once, on every rank, after wrapping the model and before the first backward pass; the ranks compare what
    they are about to do first. The training script stays as it is: gradient accumulation with `no_sync()`, frozen
    and unused parameters, `static_graph`, clipping, GradScaler, bf16 autocast and `torch.compile` work as before.

    model: a DistributedDataParallel, compiled or not, without a hook of its own. Sparse gradients, and those that are
        not float32, bfloat16 or float16, go by torch's own all-reduce, which is logged, and count as native_bytes.
    optimizer: its steps trigger the comparison of parameters between ranks; without one, call `check()` yourself.
    bits: "none" (the native collective, untouched), "identity" (our reduction, uncompressed), "lossless", a number
        of bits a value (2.0), a codec's name ("grid:0.5", "int8", ...), or "auto": links and codecs are measured for
        some seconds, and the least compression that makes a step as short as it gets is chosen, or "none"; the reason
        is in `stats()` (docs/planner.md). A state that is loaded brings its own plan along.
    overrides: other wishes for parameters by shell-style patterns of their names, the first match counts:
        {"*.bias": "none", "lm_head.*": 4.0}. "none" sends them uncompressed in the same messages.
    max_error: instead of bits: as many as keep the relative error of every packet, ‖decoded − x‖ / ‖x‖, within this
        (0.0125 to 1). Encodes up to a few times where gradients change, and measures every packet.
    bytes_per_step: instead of bits: as many as let this rank send so many bytes in a step, on average.
    scale: what the quantizer's step sizes follow. "local": blocks of 256 values, for Adam-like optimizers. "global":
        one step for all packets, on which the ranks agree, the least squared error for a rate, for SGD.
        "second_moment": one step a packet after division by the optimizer's √v, which all ranks know. "auto": "global"
        for torch.optim.SGD on a CPU unless messages are bounded, else "local" (on a GPU "global" has no kernel of its
        own yet, and runs in torch).
    messages: "exact": as long as their content takes, which ranks tell each other first. "bounded": as long as the
        number of bits says, about 3 % above it: no sizes travel, and on a GPU the host waits for nothing; blocks for
        which that is not enough are zeroed and counted (dropped_blocks). For bits="lossless", max_error,
        bytes_per_step and steps of another scale than "local" there are exact ones only (docs/compression.md). "auto":
        exact, but with bits="auto" bounded where that is predicted to be faster by more than 2 %.
    error_feedback: add what a packet leaves out to the parameter's next one; takes 8 bytes a value on every rank.
        "auto": where scale is "global" and the optimizer is torch.optim.SGD. With Adam residuals come back as
        rare large values, which inflate its second moment (docs/experiments.md).
    scaler: your GradScaler, for error feedback: residuals follow its scale. A step that it skips leaves no trace.
    shadow: apply the native result, bit for bit, and only report what compression would have sent, cost and erred.
    group: the process group to reduce over, by default the model's. Two more groups of its ranks are made.
    transport: what carries the compressed bytes: None, the process group; "mpi", MPI between all processes that mpirun
        started (see efficient_dl.comm.mpi, also for its `init_process_group`); or a Transport between the group's
        ranks, which stays yours to close. The process group carries the rest: DDP's own, comparisons, statistics.
    check_every: compare all parameters of all ranks, bit by bit, after every so many optimizer steps; 0: never, as
        with bits="none".
    timeout: seconds after which an unfinished transfer, the wait for the slowest rank included, raises TransportError
        and names the rank: longer than anything one rank does alone, such as an evaluation.
    kernel: which kernels code CPU tensors, as in `make_codec`.
    extra: further facts that must agree on all ranks, for example {"data": hash}; compared as text.
    hierarchy: None: all ranks reduce as equals. The number of ranks on each node, a DeviceMesh of nodes × ranks, or
        "auto" (the launcher's variables, else host names): full precision inside a node, compressed between nodes; see
        `HierarchicalReduction`. Bytes and ratio are then of what leaves the node, local_bytes of what stays inside.
        Nodes with different numbers of ranks, or with one each, reduce flat, which is logged. "groups", or
        "groups:SIZE": for many ranks with links of their own, fewer messages and a third rounding; see
        `GroupedReduction`. With bits="auto" groups are also among the choices of "auto" where every node has one rank,
        and of "groups" the size is chosen by what was measured.
    max_relative_error: an alarm is raised where the sampled error of a window of 20 steps, or of one parameter in it,
        is larger; None: 1.0, the error of sending nothing. Other alarms: compression costs more time than it saves,
        unusually many escapes or zeroed blocks, gradients that are never finite. Each kind is raised once. Times are
        judged by all ranks together, when they compare their parameters.
    floor_bits: the fewest bits a value that "auto" may choose.
    backward_seconds: for "auto": what a step takes without communication, forward pass included; 0.0: not known, then
        communication counts as if nothing could hide it.
    replan: for "auto": look again during the run, for at most 0.5 % of the time, and go over to what pays by then, on
        all ranks after the same step; where parameters are compared, so it needs an optimizer and check_every.
    measurements: for "auto": of these ranks, from before, instead of measuring at the start.
    on_alarm: "warn" logs it, "disable" also turns compression off on all ranks (see `Compression.disable`), but not
        in the shadow; it needs an optimizer and check_every.

    DDP's join() is not supported, nor are optimizers inside of the backward pass. With one rank there is nothing to
    send: nothing is encoded or quantized.

    Raises ConfigError, PackageMissing, UnsupportedTensor, PlanMismatch (ranks differ), TransportError.

    Example:
        compression = edl.compress(DistributedDataParallel(model), optimizer, bits=2.0)
        ...                                # train as before
        print(compression.stats()["ratio"])
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(DistributedDataParallel(...))
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"compress_ddp() cannot take a {type(model).__name__}",
            expected="a torch.nn.parallel.DistributedDataParallel",
            fix="compress(DistributedDataParallel(model), optimizer)",
        )
    parameters = averaged_parameters(model)
    device = next(iter(parameters.values())).device
    reducing_group = group or model.process_group
    assert reducing_group is not None  # DDP has one
    control = ProcessGroupTransport(reducing_group, device, timeout)
    facts = common_facts(parameters, extra or {})
    facts["shadow"], facts["check_every"] = shadow, check_every if optimizer else 0
    facts["alarm"] = {"max_relative_error": max_relative_error, "on_alarm": on_alarm}
    facts["left to torch"] = left_to_torch(model, parameters)
    try:
        check_supported(model, parameters, check_every)
        wish = NodesWish(hierarchy, control)
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        if scale == "auto":
            scale = automatic_scale(is_sgd, device, messages == "bounded")
        wishes = Plan.of(
            bits,
            overrides=overrides,
            max_error=max_error,
            bytes_per_step=bytes_per_step,
            values_per_step=values_sent(parameters, wish.sent_share()),
            error_feedback=is_asked_for(error_feedback, scaler, optimizer),
            scale=scale,
            messages="exact" if messages == "auto" else messages,
        )
        feeds = wishes.error_feedback or feeds_if_lossy(error_feedback, is_sgd, wishes.scale)
        plan = dataclasses.replace(
            wishes, error_feedback=wishes.error_feedback or (feeds and wishes.is_lossy)
        )
        check_hierarchy(hierarchy, plan, shadow, transport)
        check_alarms(max_relative_error, on_alarm, optimizer, check_every)
        can_replan = optimizer is not None and check_every > 0
        if isinstance(replan, ReplanOptions) and replan.active and not can_replan:
            raise ConfigError(
                "plans change where parameters are compared",
                expected="an optimizer and check_every above 0",
                found=f"check_every={check_every}, {'an' if optimizer else 'no'} optimizer",
                fix="compress(model, optimizer), or replan=False",
            )
        second_moment = SecondMoment(optimizer, parameters, plan) if scale == "second_moment" else None
        compressor = Compressor(plan, list(parameters), kernel, make_residuals(plan, parameters, device))
        check_transport(transport, control, native=shadow or plan.codec == "none")
        auto = AutoOptions(
            floor_bits,
            backward_seconds,
            family="grid" if scale == "global" else "bits",
            exact=scale != "second_moment",
            feeds_back=feeds,
            kernel=kernel,
            bucket_copies=bucket_copies(model),
            planner=dataclasses.replace(
                ways(hierarchy, control.world_size),
                bucket_bytes=bucket_bytes(model),
                bounded=messages == "auto"
                and scale == "local"
                and all(knows_capacity(codec) for _, codec in plan.overrides),
            ),
        )
        auto.check()
    except EdlError as error:
        handshake(facts, control, failure=error)
        raise
    facts["plan"] = {"bits": plan.bits, **plan.facts()}
    facts["kernel"] = compressor.codec.kernel_for(device).partition("-")[0]
    facts["transport"] = transport_name(transport)
    facts["hierarchy"] = wish.fact()
    is_auto = plan.bits == "auto" and not plan.varies_rates and not shadow and control.world_size > 1
    told = {
        **auto.facts(),
        "replan": str(replan),
        "measurements": _digest(measurements),
        "messages": messages,
    }
    facts["auto"] = told if is_auto else None
    handshake(facts, control)
    topology = wish.topology()
    carrier = make_transport(transport, control)
    with contextlib.ExitStack() as closing:
        if isinstance(transport, str):
            closing.callback(carrier.close)
        replanner = None
        if is_auto:

            def meant(choice: ChosenPlan) -> Plan:
                """The user's wishes with the bits that were chosen; the native all-reduce takes none of them."""
                if choice.bits == "none":
                    return Plan.of("none")
                found = Plan.of(
                    choice.bits, overrides=overrides, error_feedback=wishes.error_feedback, scale=wishes.scale
                )
                feeds_now = found.error_feedback or (feeds and found.is_lossy)
                bounded = choice.bounded if messages == "auto" else messages == "bounded"
                kind: Messages = "bounded" if bounded else "exact"
                return dataclasses.replace(found, error_feedback=feeds_now, messages=kind)

            nodes = topology if topology is not None and not topology.groups else None
            several = nodes is not None and nodes.flat_reason() is None and len(nodes.nodes) > 1
            known = flat(measurements) if measurements is not None and not several else measurements
            measured, decision = decide(parameters, control, carrier, nodes, auto, known)
            if decision.bits == "none":
                ignored = note_ignored(overrides=overrides, transport=transport)
                decision = dataclasses.replace(decision, reason=decision.reason + ignored)
            compressor.follow(meant(ChosenPlan.of(decision, 0, decision.reason)))
            options = (
                replan if isinstance(replan, ReplanOptions) else ReplanOptions(active=replan and can_replan)
            )
            if replan and not can_replan and control.rank == 0:
                _log.warning("bits auto: planned once, for want of an optimizer or of check_every")
            replanner = Replanner(
                measured,
                decision,
                shapes_of(parameters),
                auto,
                meant,
                control,
                carrier,
                Levels.of(nodes, control) if nodes is not None and several else None,
                Sample(sum(p.numel() for p in of_one_dtype(parameters))),
                options,
            )
            agreed = dict(zip(("auto", "hierarchy", "group_size"), decision.plan, strict=True))
            handshake({**agreed, "bounded": decision.bounded}, control)
        compression = Compression(
            model,
            optimizer,
            compressor,
            control,
            shadow,
            check_every,
            carrier,
            GroupGuards(control, max_relative_error, on_alarm, shadow),
            scaler,
            second_moment,
            topology,
            replanner,
            owns_carrier=is_auto and isinstance(transport, str),
        )
        if is_auto:
            closing.pop_all()  # it measures by the carrier, and closes it; else by siblings of it alone
    return compression


def _digest(measurements: Measurements | None) -> str:
    """Tells whether ranks were given the same measurements."""
    if measurements is None:
        return "none"
    return xxhash.xxh3_64_hexdigest(json.dumps(measurements.to_json(), sort_keys=True).encode())
