"""What bits = "auto" means for a run, and what `edl probe` answers: measured with the run's own model and batches."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from efficient_dl.comm import ProcessGroupTransport, Topology
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, PlannerOptions, Shapes, codec_bits, plan_for
from efficient_dl.config import Config
from efficient_dl.data import Dataset
from efficient_dl.errors import ConfigError
from efficient_dl.integrations.auto import AutoOptions, decide, shapes_of
from efficient_dl.integrations.feedback import feeds_if_lossy
from efficient_dl.training import measure
from efficient_dl.training.console import Progress
from efficient_dl.training.end_to_end import Trainer, hierarchy_wish, is_sgd, planner_options, scale_of
from efficient_dl.training.run_folder import recorded_plan


@dataclass(frozen=True)
class Planned:
    """What was measured for a model, and what follows. options: what could be chosen."""

    measurements: Measurements
    model: Shapes
    decision: Decision
    options: PlannerOptions

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "measurements": self.measurements.to_json(),
            "values": self.model.numels,
            "itemsize": self.model.itemsize,
            "decision": self.decision.to_json(),
        }

    def what_if(self, measurements: Measurements, floor_bits: float) -> Planned:
        """The plan for the same model and codecs on another network."""
        options = PlannerOptions(hierarchy=measurements.between is not None, groups=True)
        decision = plan_for(measurements, self.model, floor_bits, options)
        return Planned(measurements, self.model, decision, options)


def measured_plan(
    config: Config, data: Dataset, device: torch.device, progress: Progress, hierarchy: int | str | None
) -> Planned:
    """Measures for some seconds and plans; every rank calls it with the same configuration, and all get the same.

    The times are of the whole model's backward pass, also where a run trains its partitions by local losses.
    hierarchy: whether a reduction between nodes is among the choices, where nodes have several ranks each, or in groups
    else: None, "auto", the number of workers on each node, "groups" or "groups:SIZE".
    """
    trainer = Trainer(config, data, device, progress)
    compute = trainer.measured_compute()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    wish, scale = config.compression, scale_of(config, trainer.optimizer, device)
    planner = planner_options(config, hierarchy, dist.get_world_size(), scale)
    options = AutoOptions(
        wish.floor_bits,
        compute.seconds,
        compute.ready,
        family="grid" if scale == "global" else "bits",
        exact=scale != "second_moment",
        feeds_back=wish.error_feedback == "on"
        or feeds_if_lossy(wish.error_feedback, is_sgd(trainer.optimizer), scale),
        planner=planner,
    )
    world = dist.group.WORLD
    assert world is not None
    # Not a sibling, to be destroyed: torch would give its name, and those of groups made after it, again (`subgroup`).
    control = ProcessGroupTransport(world, device, config.run.timeout_seconds)
    with measure.untouched(trainer.model, device):
        trainer.backward(trainer.model)  # codecs are measured on a real gradient
        nodes = Topology.of_size(control.world_size, hierarchy) if isinstance(hierarchy, int) else None
        measurements, decision = decide(parameters, control, control, nodes, options)
    return Planned(measurements, shapes_of(parameters), decision, planner)


def is_planned(config: Config) -> bool:
    """Whether a run's bits are left to the planner."""
    compression = config.compression
    return compression.bits == "auto" and not (compression.max_error or compression.bytes_per_step)


@dataclass(frozen=True)
class Decided:
    """What "auto" stands for in a run.

    config: with the bits, or still "auto" where the run may change them. note: why. measurements: to plan with.
    planned: what was measured now; None if nothing was.
    """

    config: Config
    note: str
    measurements: Measurements | None = None
    planned: Planned | None = None


def decided(
    config: Config, data: Dataset, device: torch.device, progress: Progress, resumed: bool
) -> Decided:
    """What "auto" means here; every rank calls it with the same configuration, and all get the same.

    A resumed run takes what was measured at its start, if it was for as many workers, and its checkpoint's plan.
    """
    floor = config.compression.floor_bits
    if config.compression.shadow:
        return Decided(_with_bits(config, floor), f"bits auto: {floor:g} bits, the floor, in the shadow")
    if dist.get_world_size() == 1:
        note = f"bits auto: {floor:g} bits, the floor; one worker sends nothing"
        return Decided(_with_bits(config, floor), note)
    changes = config.local.mode == "end-to-end"
    if resumed and changes and (known := _recorded(config)) is not None:
        note = "bits auto: planned as before; a resumed run measures nothing at its start"
        return Decided(config, note, known)
    planned = measured_plan(config, data, device, progress, hierarchy_wish(config) if changes else None)
    if changes and (size := planned.decision.bucket_bytes):
        options = dataclasses.replace(planned.options, bucket_bytes=size)
        decision = plan_for(planned.measurements, planned.model, floor, options)  # as DDP's will be
        planned = dataclasses.replace(planned, decision=decision)
    bits = planned.decision.bits
    note = f"bits auto: {planned.decision.reason}"
    if changes and planned.decision.bucket_bytes:
        note += f"; in buckets of {planned.decision.bucket_bytes >> 20} MiB"
    if changes:
        return Decided(config, note, planned.measurements, planned)
    chosen = _with_bits(config, float(bits) if bits not in ("none", "lossless") else bits)
    if bits == "none" and (config.compression.overrides or config.compression.error_feedback == "on"):
        compression = dataclasses.replace(chosen.compression, overrides="", error_feedback="auto")
        chosen = dataclasses.replace(chosen, compression=compression)
        note += "; overrides and error feedback are off: the native all-reduce has none"
    return Decided(chosen, note, planned.measurements, planned)


def _recorded(config: Config) -> Measurements | None:
    """Of the run's folder, if they are of as many workers and of the codecs that may be chosen now."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
            known = Measurements.from_json(recorded_plan(Path(config.run.out))["measurements"])
            rates = {codec_bits(one.codec) for one in known.codecs}
            wish = config.compression
            options = AutoOptions(wish.floor_bits, exact=wish.scale != "second_moment")
            wanted = {codec_bits(one) for one in options.codecs()}
            if known.world_size == dist.get_world_size() and rates == wanted:
                found = [known.to_json()]
    dist.broadcast_object_list(found, src=0)
    return Measurements.from_json(found[0]) if found[0] is not None else None


def _with_bits(config: Config, bits: float | str) -> Config:
    return dataclasses.replace(config, compression=dataclasses.replace(config.compression, bits=bits))
