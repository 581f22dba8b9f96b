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
from efficient_dl.integrations.auto import DDP_COPIES, AutoOptions, decide, is_under_floor, shapes_of
from efficient_dl.integrations.feedback import feeds_if_lossy
from efficient_dl.models import build_model
from efficient_dl.training import measure
from efficient_dl.training.console import Progress
from efficient_dl.training.end_to_end import Trainer, hierarchy_wish, is_sgd, planner_options, scale_of
from efficient_dl.training.optimizers import Optimizer
from efficient_dl.training.run_folder import recorded_plan
from efficient_dl.training.watch import Unwatched, Watch


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
    config: Config,
    data: Dataset,
    device: torch.device,
    progress: Progress,
    hierarchy: int | str | None,
    watch: Watch | None = None,
) -> Planned:
    """Measures for some seconds and plans; every rank calls it with the same configuration, and all get the same.

    Where a run trains partitions by local losses, no backward pass is made: one of the whole model might not fit, and
    nothing hides behind it.

    hierarchy: whether a reduction between nodes is among the choices, where nodes have several ranks each, or in groups
    else: None, "auto", the number of workers on each node, "groups" or "groups:SIZE".
    """
    trainer: Trainer | None = None
    if config.local.mode == "end-to-end":
        trainer = Trainer(config, data, device, progress)
        trainer.watch = watch or Unwatched()
        model, optimizer, compute = trainer.model, trainer.optimizer, trainer.measured_compute()
    else:
        model = build_model(config.model, data.spec, config.train.seed).to(device)
        optimizer, compute = Optimizer(model, config.optimizer), measure.Compute(0.0, {})
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wish, scale = config.compression, scale_of(config, optimizer, device)
    planner = planner_options(config, hierarchy, dist.get_world_size(), scale)
    options = AutoOptions(
        wish.floor_bits,
        compute.seconds,
        compute.ready,
        family="grid" if scale == "global" else "bits",
        exact=scale != "second_moment",
        feeds_back=wish.error_feedback == "on"
        or feeds_if_lossy(wish.error_feedback, is_sgd(optimizer), scale),
        bucket_copies=DDP_COPIES,
        planner=planner,
    )
    world = dist.group.WORLD
    assert world is not None
    # Not a sibling, to be destroyed: torch would give its name, and those of groups made after it, again (`subgroup`).
    control = ProcessGroupTransport(world, device, config.run.timeout_seconds)
    with measure.untouched(model, device):
        if trainer is not None:
            trainer.backward(model)  # codecs are measured on a real gradient
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
    planned: what was measured now; None if nothing was. is_measured: whether the bits come from a measurement, so that
    the folder keeps the wish, and the measurement beside it.
    """

    config: Config
    note: str
    measurements: Measurements | None = None
    planned: Planned | None = None
    is_measured: bool = False


def decided(
    config: Config,
    data: Dataset,
    device: torch.device,
    progress: Progress,
    resumed: bool,
    watch: Watch | None = None,
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
    if resumed and not changes and (bits := _recorded_bits(config)) is not None:
        note = f"bits auto: {bits} as before; a resumed run measures nothing again"
        return Decided(_with_bits(config, bits), note, is_measured=True)
    hierarchy = hierarchy_wish(config) if changes else None
    planned = measured_plan(config, data, device, progress, hierarchy, watch)
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
    chosen = _with_bits(config, bits)
    if ignored := [name for name in _NOT_NATIVE if _of(chosen, name) != _of(config, name)]:
        note += f"; the native all-reduce takes no {', '.join(ignored)}"
    return Decided(chosen, note, planned.measurements, planned, is_measured=True)


def _recorded_bits(config: Config) -> str | None:
    """What the run's folder says was decided among as many workers, if it may still be chosen."""
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
            plan = recorded_plan(Path(config.run.out))
            known, bits = Measurements.from_json(plan["measurements"]), str(plan["decision"]["bits"])
            if known.world_size == dist.get_world_size():
                found = [bits]
    dist.broadcast_object_list(found, src=0)
    bits = found[0]
    return None if bits is None or is_under_floor(bits, config.compression.floor_bits) else bits


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


# Settings of compression that the native all-reduce has no use for, and their defaults.
_NOT_NATIVE: dict[str, Any] = {
    "overrides": "",
    "error_feedback": "auto",
    "scale": "auto",
    "messages": "auto",
    "hierarchy": "plan",
    "transport": "process_group",
}


def _of(config: Config, name: str) -> Any:
    return getattr(config.compression, name)


def _with_bits(config: Config, bits: float | str) -> Config:
    """A decision's bits; with "none" without what only compression takes."""
    chosen = bits if bits in ("none", "lossless") else float(bits)
    cleared = _NOT_NATIVE if bits == "none" else {}
    return dataclasses.replace(
        config, compression=dataclasses.replace(config.compression, bits=chosen, **cleared)
    )
