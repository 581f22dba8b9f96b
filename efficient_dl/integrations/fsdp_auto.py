"""What bits="auto" means for a sharded model: a probe and a decision for each axis of its mesh, and for its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import Plan, ProcessGroupTransport, gather_json
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, PlannerOptions, Shapes, plan_for
from efficient_dl.comm.probe import SAMPLE_NUMEL, sample_gradient
from efficient_dl.comm.routes import gradual
from efficient_dl.integrations.auto import AutoOptions, is_under_floor, measured
from efficient_dl.integrations.fsdp_comms import Lane, native_reduce_scatter
from efficient_dl.integrations.fsdp_gathers import native_all_gather
from efficient_dl.integrations.fsdp_setup import REPLICATE, SHARD
from efficient_dl.integrations.fsdp_units import Unit
from efficient_dl.integrations.native_wait import wait_for_native

WEIGHTS = "weights"
_EACH_UNIT_A_BUCKET = 1  # bytes: every unit fills one
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """bits, and why, of each axis and of the weights; nothing of a group of one rank, or of weights no codec takes."""

    bits: dict[str, str] = field(default_factory=dict[str, str])
    reasons: dict[str, str] = field(default_factory=dict[str, str])

    def to_json(self) -> dict[str, Any]:
        """As states hold it."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Chosen:
        """Undoes `to_json`."""
        return Chosen(dict(values["bits"]), dict(values["reasons"]))

    def __str__(self) -> str:
        return ", ".join(f"{one}: {bits}" for one, bits in self.bits.items())


@dataclass(frozen=True)
class Planned:
    """One thing that was measured and planned; it can be looked at again by the same means.

    what: SHARD, REPLICATE or WEIGHTS. own: the group that was planned for. other: of the mesh's other axis, along which
    there are more such groups, the first of which measures for all. auto: with what the planner may choose here.
    """

    what: str
    measurements: Measurements
    decision: Decision
    model: Shapes
    auto: AutoOptions
    own: ProcessGroupTransport
    other: ProcessGroupTransport | None


@dataclass(frozen=True)
class Automatic:
    """What "auto" chose at this start, and what other choices mean, at a resume or later in the run.

    plans: of a choice, by what they are for: "gradients", "replicas" and "weights". planned: what was measured; empty
    where nothing was, on several meshes.
    """

    chosen: Chosen
    floor_bits: float
    plans: Callable[[Chosen], dict[str, Plan]]
    planned: tuple[Planned, ...] = ()

    def resumed(self, saved: Chosen) -> Chosen:
        """What a run with this saved choice goes on with: the saved one, unless the user asks for other things now.

        That is a higher floor, or bits of their own for what was chosen then; such runs keep this start's choice.
        """
        same = self.chosen.bits.keys() == saved.bits.keys()
        if not same or any(is_under_floor(bits, self.floor_bits) for bits in saved.bits.values()):
            return self.chosen
        return saved


def choose(
    units: Sequence[Unit], lanes: Sequence[Lane], wanted: Sequence[str], options: AutoOptions
) -> tuple[Chosen, tuple[Planned, ...]]:
    """Measures and plans each of `wanted`; every rank calls it together with equal arguments, and gets the same.

    lanes: the model's distinct ones. With several, of modules on several meshes, nothing is measured: gradients get
    the floor and weights are lossless, which is logged and is the reason.

    Raises TransportError if a rank is gone.
    """
    chosen, planned = Chosen(), list[Planned]()
    for one in wanted:
        if len(lanes) > 1:
            chosen.bits[one] = "lossless" if one == WEIGHTS else f"{options.floor_bits}"
            chosen.reasons[one] = "auto measures no models with modules on several meshes"
            _log.warning("%s: %s bits: %s", one, chosen.bits[one], chosen.reasons[one])
            continue
        own, other = lanes[0].control, lanes[0].replica_control
        if one == REPLICATE:
            assert other is not None
            own, other = other, own
        takes_part = one != WEIGHTS or any(unit.own_chunk() is not None for unit in units)
        if own.world_size > 1 and takes_part:
            planned.append(_planned(one, units, own, other, options))
            decision = planned[-1].decision
            chosen.bits[one], chosen.reasons[one] = decision.bits, decision.reason
            if dist.get_rank() == 0:
                _log.info("auto, %s: %s", one, decision.reason)
    return chosen, tuple(planned)


def _planned(
    one: str,
    units: Sequence[Unit],
    own: ProcessGroupTransport,
    other: ProcessGroupTransport | None,
    options: AutoOptions,
) -> Planned:
    one_way = one != REPLICATE
    planner = PlannerOptions(bucket_bytes=_EACH_UNIT_A_BUCKET, one_way=one_way, native_one_way=one_way)
    options = replace(options, planner=planner, feeds_back=options.feeds_back and one != WEIGHTS)
    if one == WEIGHTS:
        sample, codecs = sample_of_weights(units, SAMPLE_NUMEL), ("lossless",)
        numels = [unit.gather_layout().bucket.numel for unit in units]
    else:
        sample, codecs = _gradients(units), options.codecs()
        layouts = [unit.trained_layout() for unit in units]
        numels = [x.bucket.numel if one == SHARD else x.chunk_numel for x in layouts]
    found = measured(sample, codecs, own, own, None, options, native_of(one, own))
    found = of_the_first(found, other)
    model = Shapes(tuple(filter(None, numels)), sample[0].element_size())
    if one == WEIGHTS:  # wanted from the first moment of a step on, not from the end of its forward pass
        found = replace(found, ready=gradual(model.numels, 0.0))
    decision = plan_for(found, model, options.floor_bits, planner)
    return Planned(one, found, decision, model, options, own, other)


def of_the_first(found: Measurements, other: ProcessGroupTransport | None) -> Measurements:
    """What the first of the groups along the other axis has found, the same in all of them."""
    return found if other is None else Measurements.from_json(gather_json(found.to_json(), other)[0])


def native_of(one: str, own: ProcessGroupTransport) -> Callable[[Tensor], object]:
    """torch's own collective, of a tensor as long as the whole; it waits, at most for the transport's time-out.

    one: what it carries, SHARD, REPLICATE or WEIGHTS. It raises TransportError.
    """
    group = own.group
    starts: dict[str, Callable[[Tensor], dist.Work | None]] = {
        SHARD: lambda x: native_reduce_scatter(_chunk(x, own), x, group, dist.ReduceOp.SUM, async_op=True),
        REPLICATE: lambda x: dist.all_reduce(x, group=group, async_op=True),
        WEIGHTS: lambda x: native_all_gather(x, _chunk(x, own), group, async_op=True),
    }
    names = {SHARD: "reduce-scatter", REPLICATE: "all-reduce", WEIGHTS: "all-gather"}
    return lambda x: wait_for_native(
        lambda: starts[one](x), own, f"{names[one]}, in a measurement of the links,"
    )


def _chunk(x: Tensor, group: ProcessGroupTransport) -> Tensor:
    return x.new_empty(x.numel() // group.world_size)


def gradient_numels(units: Sequence[Unit]) -> list[int]:
    """Of the parameters whose gradients have the same dtype as those of the last unit that has any."""
    trained = [unit for unit in units if unit.trained_layout().bucket.numel]
    return [
        numel
        for unit in trained
        if unit.gradient_dtype == trained[-1].gradient_dtype
        for numel in unit.trained_layout().bucket.numels
    ]


def _gradients(units: Sequence[Unit]) -> tuple[Tensor, list[int]]:
    """Values that resemble gradients: parameters that have no memory, but a shape."""
    dtype = next(unit.gradient_dtype for unit in reversed(units) if unit.trained_layout().bucket.numel)
    shapes = [torch.empty(1, dtype=dtype, device=units[0].device).expand(n) for n in gradient_numels(units)]
    return sample_gradient(shapes)


def sample_of_weights(units: Sequence[Unit], limit: int) -> tuple[Tensor, list[int]]:
    """The own part of the last units' weights as gathered: 1-D, at most so many values; and its parts' numels."""
    parts: list[Tensor] = []
    for unit in reversed(units):
        chunk = unit.own_chunk() if limit > 0 else None  # a copy, which is given up at once
        if chunk is not None and chunk.numel() and (not parts or chunk.dtype == parts[0].dtype):
            parts.append(chunk[:limit].clone())
            limit -= parts[-1].numel()
    return torch.cat(parts), [part.numel() for part in parts]
