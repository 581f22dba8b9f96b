"""What has to be decided before a sharded model is compressed: one plan for each axis of its mesh, and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from efficient_dl.comm import Compressor, Plan, ProcessGroupTransport, Residuals, handshake, shard_numels
from efficient_dl.comm.plan import Messages
from efficient_dl.errors import ConfigError, EdlError, UnsupportedTensor
from efficient_dl.integrations.auto import note_ignored
from efficient_dl.integrations.fsdp_comms import GRADIENT_DTYPES, Lane
from efficient_dl.integrations.fsdp_gathers import WEIGHT_DTYPES
from efficient_dl.integrations.fsdp_units import Unit, check_replacing

SHARD, REPLICATE = "shard", "replicate"


@dataclasses.dataclass(frozen=True)
class AxisWish:
    """What `compress_fsdp` was asked to do with gradients. reasons: of the bits of axes, where "auto" decided them."""

    bits: str | float
    axes: Mapping[str, str | float]
    overrides: Mapping[str, str | float] | None
    max_error: float | None
    bytes_per_step: int | None
    error_feedback: bool
    messages: Messages = "exact"
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def automatic(self, units: Sequence[Unit]) -> list[str]:
        """The axes whose bits are to be measured."""
        if self.bits != "auto" or self.max_error is not None or self.bytes_per_step is not None:
            return []
        exist = [SHARD, *([REPLICATE] if any(unit.replicas is not None for unit in units) else [])]
        return [axis for axis in exist if axis not in self.axes and any(map(_values_scattered, units))]

    def decided(self, bits: Mapping[str, str], reasons: Mapping[str, str]) -> AxisWish:
        """The wish with what "auto" means. bits, reasons: of what was measured, axes and others."""
        bits = {axis: one for axis, one in bits.items() if axis in (SHARD, REPLICATE)}
        reasons = {
            axis: reasons[axis] + (note_ignored(overrides=self.overrides) if one == "none" else "")
            for axis, one in bits.items()
        }
        return dataclasses.replace(self, axes={**self.axes, **bits}, reasons=reasons)

    def plans(self, units: Sequence[Unit]) -> dict[str, Plan]:
        """A plan for each axis; without replicas theirs is "none". Raises ConfigError."""
        has_replicas = any(unit.replicas is not None for unit in units)
        for axis in self.axes:
            if axis not in (SHARD, REPLICATE) or (axis == REPLICATE and not has_replicas):
                raise ConfigError(
                    f"the model has no axis {axis!r}",
                    expected=f'"{SHARD}"' + (f' or "{REPLICATE}"' if has_replicas else ", and no other"),
                    fix="fully_shard(..., mesh=init_device_mesh(device, (replicas, shards))) makes two",
                )
        values = {SHARD: sum(map(_values_scattered, units)), REPLICATE: sum(map(_values_replicated, units))}
        shared = sum(values[axis] for axis in values if axis not in self.axes)
        plans: dict[str, Plan] = {}
        for axis, numel in values.items():
            if axis == REPLICATE and not has_replicas:
                plans[axis] = Plan.of("none")
            elif axis in self.axes:
                wish = self.axes[axis]
                plan = Plan.of(wish, overrides=None if wish == "none" else self.overrides)
                plans[axis] = dataclasses.replace(plan, reason=self.reasons.get(axis, plan.reason))
            else:
                budget = self.bytes_per_step
                plans[axis] = Plan.of(
                    self.bits,
                    overrides=self.overrides,
                    max_error=self.max_error,
                    bytes_per_step=None if budget is None else max(budget * numel // max(shared, 1), 1),
                    values_per_step=numel,
                )
        return {axis: dataclasses.replace(plan, messages=self.messages) for axis, plan in plans.items()}

    def compressors(self, units: Sequence[Unit], names: Sequence[str], kernel: str) -> dict[str, Compressor]:
        """A compressor for each axis, with residuals where error feedback was asked for and something is left out.

        Where "auto" has decided, there are residuals in any case: another decision may follow.
        """
        numels: dict[str, Callable[[], dict[str, int]]] = {
            SHARD: lambda: _joined([_whole_numels(unit) for unit in units]),
            REPLICATE: lambda: _joined(
                [shard_numels(unit.gather_layout(), unit.group.rank()) for unit in units]
            ),
        }
        made: dict[str, Compressor] = {}
        plans = self.plans(units)
        if not self.reasons and not any(plan.is_bounded for plan in plans.values()):
            plans[SHARD].check_messages()
        for axis, plan in plans.items():
            made[axis] = Compressor(plan, names, kernel)
            feeds = feeds_back(made[axis])
            # What "auto" has decided may be decided otherwise later; residuals take memory only once something is kept.
            if self.error_feedback and (feeds or axis in self.reasons):
                residuals = Residuals(numels[axis](), units[0].device)
                fed = dataclasses.replace(plan, error_feedback=True)
                made[axis] = Compressor(fed, names, kernel, residuals)
                if not feeds:
                    made[axis].follow(plan)
        if self.error_feedback and not self.reasons and all(one.residuals is None for one in made.values()):
            raise ConfigError(
                "error_feedback has nothing to feed back",
                found=", ".join(f"{axis}: {one.plan.bits}" for axis, one in made.items()),
                fix="bits=2.0, or leave error_feedback out",
            )
        return made


def feeds_back(compressor: Compressor) -> bool:
    """Whether its packets leave something out that error feedback could bring back."""
    return compressor.plan.codec != "none" and not compressor.exact


def agree(
    facts: Mapping[str, Any], controls: Sequence[ProcessGroupTransport], failure: EdlError | None
) -> None:
    """Compares the facts in every group; whoever fails in one tells the next. Raises what failed first."""
    for control in controls:
        try:
            handshake(facts, control, failure)
        except EdlError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def lanes_of(units: Sequence[Unit], timeout: float) -> dict[str, Lane]:
    """One for each pair of groups that units use, by `lane_key`."""
    lanes: dict[str, Lane] = {}
    for unit in units:
        if lane_key(unit) not in lanes:
            lanes[lane_key(unit)] = Lane(unit.group, unit.replicas, unit.device, timeout)
    return lanes


def lane_key(unit: Unit) -> str:
    """Which lane is a unit's."""
    return f"{unit.group.group_name} {unit.replicas.group_name if unit.replicas else ''}"


def check_supported(
    units: Sequence[Unit],
    model: nn.Module,
    wish: AxisWish,
    check_every: int,
) -> None:
    """Raises ConfigError or UnsupportedTensor for a model, or options, that cannot be."""
    if check_every < 0:
        raise ConfigError("check_every is negative", expected="optimizer steps, or 0", found=str(check_every))
    devices = sorted({str(unit.device) for unit in units})
    if len(devices) > 1:
        raise UnsupportedTensor("the model's parameters must be on one device", found=", ".join(devices))
    sharded = {name for unit in units for name in unit.names}
    for name, parameter in model.named_parameters():
        allowed = GRADIENT_DTYPES if parameter.requires_grad else WEIGHT_DTYPES
        if name in sharded and parameter.dtype not in allowed:
            raise UnsupportedTensor(
                f"parameter {name!r} cannot be compressed",
                expected=", ".join(str(dtype).removeprefix("torch.") for dtype in allowed),
                found=str(parameter.dtype),
                fix='convert it, or use bits="none", weights="none"',
            )


def check_replicas(units: Sequence[Unit]) -> None:
    """Raises EdlError unless we can reduce between replicas in torch's place."""
    for unit in units:
        if unit.replicas is not None:
            check_replacing(unit)
            if unit.world_size == 1:
                raise ConfigError(
                    "the mesh has replicas of unsharded parameters: torch reduces those without asking us",
                    expected="at least 2 ranks on its shard axis",
                    found=f"1, and {unit.replicas.size()} replicas",
                    where=f"the module of {unit.label!r}",
                    fix='DistributedDataParallel; or bits="none"',
                )


def _values_scattered(unit: Unit) -> int:
    """Values of its gradients that a rank sends in a step, the other ranks' chunks: on average, equal on all ranks."""
    return unit.trained_layout().bucket.numel * (unit.world_size - 1) // unit.world_size


def _values_replicated(unit: Unit) -> int:
    """The same between replicas: of the own chunk, up to the owners and down from one."""
    if unit.replicas is None:
        return 0
    count = unit.replicas.size()
    return 2 * unit.trained_layout().bucket.numel * (count - 1) // (unit.world_size * count)


def _whole_numels(unit: Unit) -> dict[str, int]:
    bucket = unit.gather_layout().bucket
    return dict(zip(bucket.names, bucket.numels, strict=True))


def _joined(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: numel for part in parts for name, numel in part.items()}
