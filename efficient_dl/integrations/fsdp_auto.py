"""What bits="auto" means for a sharded model: a probe and a decision for each axis of its mesh, and for its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import Compressor, ProcessGroupTransport, gather_json
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, PlannerOptions, Shapes, plan_for
from efficient_dl.comm.probe import SAMPLE_NUMEL, sample_gradient
from efficient_dl.comm.routes import gradual
from efficient_dl.integrations.auto import AutoOptions, is_under_floor, measured
from efficient_dl.integrations.fsdp_comms import Lane
from efficient_dl.integrations.fsdp_setup import REPLICATE, SHARD
from efficient_dl.integrations.fsdp_units import Unit

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
class Automatic:
    """What "auto" chose at this start, and how a run that was saved with another choice goes on with that one.

    compressors: of a choice, by what they encode: "gradients", "replicas" and "weights".
    """

    chosen: Chosen
    floor_bits: float
    compressors: Callable[[Chosen], dict[str, Compressor]]

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
) -> Chosen:
    """Measures and plans each of `wanted`; every rank calls it together with equal arguments, and gets the same.

    lanes: the model's distinct ones. With several, of modules on several meshes, nothing is measured: gradients get
    the floor and weights are lossless, which is logged and is the reason.

    Raises TransportError if a rank is gone.
    """
    chosen = Chosen()
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
            decision = _decided(one, units, own, other, options)
            chosen.bits[one], chosen.reasons[one] = decision.bits, decision.reason
            if dist.get_rank() == 0:
                _log.info("auto, %s: %s", one, decision.reason)
    return chosen


def _decided(
    one: str,
    units: Sequence[Unit],
    own: ProcessGroupTransport,
    other: ProcessGroupTransport | None,
    options: AutoOptions,
) -> Decision:
    """own: the group to plan for. other: of the mesh's other axis, along which there are more such groups."""
    one_way = one != REPLICATE
    planner = PlannerOptions(bucket_bytes=_EACH_UNIT_A_BUCKET, one_way=one_way, native_one_way=one_way)
    options = replace(options, planner=planner)
    native: dict[str, Callable[[Tensor], object]] = {
        SHARD: lambda x: dist.reduce_scatter_tensor(_chunk(x, own), x, group=own.group),
        REPLICATE: lambda x: dist.all_reduce(x, group=own.group),
        WEIGHTS: lambda x: dist.all_gather_into_tensor(x, _chunk(x, own), group=own.group),
    }
    if one == WEIGHTS:
        sample, codecs = _weights(units), ("lossless",)
        numels = [unit.gather_layout().bucket.numel for unit in units]
    else:
        sample, codecs = _gradients(units), options.codecs()
        layouts = [unit.trained_layout() for unit in units]
        numels = [x.bucket.numel if one == SHARD else x.chunk_numel for x in layouts]
    found = measured(sample, codecs, own, own, None, options, native[one])
    if other is not None:  # the first of these groups measures for all of them
        found = Measurements.from_json(gather_json(found.to_json(), other)[0])
    model = Shapes(tuple(filter(None, numels)), sample[0].element_size())
    if one == WEIGHTS:  # wanted from the first moment of a step on, not from the end of its forward pass
        found = replace(found, ready=gradual(model.numels, 0.0))
    return plan_for(found, model, options.floor_bits, planner)


def _chunk(x: Tensor, group: ProcessGroupTransport) -> Tensor:
    return x.new_empty(x.numel() // group.world_size)


def _gradients(units: Sequence[Unit]) -> tuple[Tensor, list[int]]:
    """Values that resemble gradients of the last units with the same dtype."""
    trained = [unit for unit in units if unit.trained_layout().bucket.numel]
    dtype = trained[-1].gradient_dtype
    numels = [
        numel
        for unit in trained
        if unit.gradient_dtype == dtype
        for numel in unit.trained_layout().bucket.numels
    ]
    return sample_gradient([torch.empty(numel, dtype=dtype, device=units[0].device) for numel in numels])


def _weights(units: Sequence[Unit]) -> tuple[Tensor, list[int]]:
    """The own part of the last units' weights, as they are gathered."""
    chunks = [chunk for unit in reversed(units) if (chunk := unit.own_chunk()) is not None]
    parts: list[Tensor] = []
    left = SAMPLE_NUMEL
    for chunk in chunks:
        if chunk.dtype == chunks[0].dtype and (part := chunk[:left]).numel():
            parts.append(part)
            left -= part.numel()
    return torch.cat(parts), [part.numel() for part in parts]
