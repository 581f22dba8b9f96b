"""What bits = "auto" means for a run, and what `edl probe` answers: measured with the run's own model and batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision, PlannerOptions, Shapes, plan_for
from efficient_dl.config import Config
from efficient_dl.data import Dataset
from efficient_dl.integrations.auto import AutoOptions, decide
from efficient_dl.training import measure
from efficient_dl.training.console import Progress
from efficient_dl.training.end_to_end import Trainer


@dataclass(frozen=True)
class Planned:
    """What was measured for a model, and what follows."""

    measurements: Measurements
    model: Shapes
    decision: Decision

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
        options = PlannerOptions(hierarchy=measurements.between is not None)
        return Planned(measurements, self.model, plan_for(measurements, self.model, floor_bits, options))


def measured_plan(
    config: Config, data: Dataset, device: torch.device, progress: Progress, hierarchy: bool = False
) -> Planned:
    """Measures for some seconds and plans; every rank calls it with the same configuration, and all get the same.

    The times are of the whole model's backward pass, also where a run trains its partitions by local losses.
    hierarchy: whether a reduction between nodes is among the choices, where nodes have several ranks each.
    """
    trainer = Trainer(config, data, device, progress)
    seconds = trainer.measured_compute()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    is_sgd = isinstance(trainer.optimizer.parts[-1], torch.optim.SGD)
    options = AutoOptions(
        config.compression.floor_bits,
        seconds,
        family="grid" if is_sgd and device.type == "cpu" else "bits",
        planner=PlannerOptions(hierarchy=hierarchy),
    )
    world = dist.group.WORLD
    assert world is not None
    control = ProcessGroupTransport(world, device, config.run.timeout_seconds).sibling()
    try:
        with measure.untouched(trainer.model, device):
            trainer.backward(trainer.model)  # codecs are measured on a real gradient
            measurements, decision = decide(parameters, control, control, None, options)
        dist.barrier()  # no rank gives up the group while another one still hears from it
    finally:
        control.close()
    model = Shapes(
        tuple(p.numel() for p in parameters.values()), next(iter(parameters.values())).element_size()
    )
    return Planned(measurements, model, decision)


def is_planned(config: Config) -> bool:
    """Whether a run's bits are left to the planner."""
    compression = config.compression
    return compression.bits == "auto" and not (compression.max_error or compression.bytes_per_step)


def decided(
    config: Config, data: Dataset, device: torch.device, progress: Progress
) -> tuple[Config, str, Planned | None]:
    """The configuration with what "auto" stands for in this run, why, and what was measured for it.

    The configuration is what a run folder records, so a resumed run measures nothing and goes on bit for bit.
    """
    floor = config.compression.floor_bits
    if config.compression.shadow:
        return _with_bits(config, floor), f"bits auto: {floor:g} bits, the floor, in the shadow", None
    if dist.get_world_size() == 1:
        return (
            _with_bits(config, floor),
            f"bits auto: {floor:g} bits, the floor; one worker sends nothing",
            None,
        )
    planned = measured_plan(config, data, device, progress)
    bits = planned.decision.bits
    note = f"bits auto: {planned.decision.reason}"
    chosen = _with_bits(config, float(bits) if bits not in ("none", "lossless") else bits)
    if bits == "none" and (config.compression.overrides or config.compression.error_feedback == "on"):
        compression = dataclasses.replace(chosen.compression, overrides="", error_feedback="auto")
        chosen = dataclasses.replace(chosen, compression=compression)
        note += "; overrides and error feedback are off: the native all-reduce has none"
    return chosen, note, planned


def _with_bits(config: Config, bits: float | str) -> Config:
    return dataclasses.replace(config, compression=dataclasses.replace(config.compression, bits=bits))
