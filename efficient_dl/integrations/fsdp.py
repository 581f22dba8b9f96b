"""FSDP2 with entropy-coded gradients and weights: `compress_fsdp`, and the `FsdpCompression` it returns."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from efficient_dl.comm import (
    DEFAULT_TIMEOUT_SECONDS,
    Compressor,
    Plan,
    ProcessGroupTransport,
    check_equal,
    combined,
    gather_json,
    handshake,
    summary,
)
from efficient_dl.errors import CheckpointError, ConfigError, EdlError, UnsupportedTensor
from efficient_dl.integrations.facts import common_facts
from efficient_dl.integrations.fsdp_comms import (
    GRADIENT_DTYPES,
    WEIGHT_DTYPES,
    Backward,
    GradientReduceScatter,
    Lane,
    WeightAllGather,
)
from efficient_dl.integrations.fsdp_units import Unit, units_of

_log = logging.getLogger(__name__)
_EXIT_SECONDS = 2.0  # how long a process that ends without close() waits for its own threads
_STATE_VERSION = 1


def compress_fsdp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float = "auto",
    *,
    weights: str | float = "lossless",
    overrides: Mapping[str, str | float] | None = None,
    max_error: float | None = None,
    bytes_per_step: int | None = None,
    check_every: int = 50,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    kernel: str = "auto",
    extra: Mapping[str, Any] | None = None,
) -> FsdpCompression:
    """Compresses what FSDP2 reduce-scatters and all-gathers, for every module of the model that it has sharded.

    `compress` comes here with a model to which fully_shard was applied; the arguments are explained there. Call it
    once, on every rank, after all fully_shard calls and before the first forward pass.

    Gradients are decoded and summed in float32 in rank order, the own contribution unquantized, and stay on their
    rank: a value is rounded by the codec once. Weights are encoded once after each step of the optimizer and sent again
    from the same packet in backward. On a CPU reductions and prefetched gathers run beside backward, which torch alone
    does not do there. Mixed precision, gradient accumulation, clipping, frozen and unused parameters, uneven shards and
    other axes of the mesh (tensor parallel) work as before.

    HSDP: the all-reduce between replicas is torch's own, uncompressed (stats() counts it as replica_wire_bytes).

    Raises ConfigError, UnsupportedTensor, PlanMismatch (ranks differ), TransportError.
    """
    if not isinstance(model, FSDPModule):
        raise ConfigError(
            f"compress_fsdp() cannot take a {type(model).__name__}",
            expected="a model to which torch.distributed.fsdp.fully_shard was applied",
            fix="fully_shard(model) first",
        )
    units = units_of(model)
    lanes = _lanes(units, timeout)
    facts = common_facts(dict(model.named_parameters()), extra or {})
    facts["check_every"] = check_every if optimizer else 0
    facts["modules"] = {str(number): " ".join(unit.names) for number, unit in enumerate(units)}
    try:
        _check_supported(units, model, check_every)
        names = list(dict.fromkeys(name for unit in units for name in unit.names))
        gradient_plan = Plan.of(
            bits,
            overrides=overrides,
            max_error=max_error,
            bytes_per_step=bytes_per_step,
            values_per_step=sum(_values_sent(unit) for unit in units),
        )
        gradients = Compressor(gradient_plan, names, kernel)
        weights_compressor = Compressor(Plan.of(weights), names, kernel)
    except EdlError as error:
        for lane in lanes.values():
            with suppress(EdlError):
                handshake(facts, lane.control, failure=error)
        raise
    for key, compressor in (("plan", gradients), ("weights", weights_compressor)):
        facts[key] = {"bits": compressor.plan.bits, **compressor.plan.facts()}
    facts["kernel"] = gradients.codec.kernel_for(units[0].device).partition("-")[0]
    for lane in lanes.values():
        handshake(facts, lane.control)
    return FsdpCompression(units, lanes, optimizer, gradients, weights_compressor, check_every, timeout)


class FsdpCompression:
    """Compressed gradients and weights of one sharded model, as `compress` set it up."""

    def __init__(
        self,
        units: Sequence[Unit],
        lanes: Mapping[str, Lane],
        optimizer: torch.optim.Optimizer | None,
        gradients: Compressor,
        weights: Compressor,
        check_every: int,
        timeout: float,
    ) -> None:
        self.plan = gradients.plan
        self.weights_plan = weights.plan
        self._gradients = gradients
        self._weights = weights
        self._check_every = check_every
        self._timeout = timeout
        self._units = list(units)
        self._lanes = [lanes[unit.group.group_name] for unit in units]
        self._control = self._lanes[0].control
        self._optimizer_steps = 0
        self._checks = 0
        compresses = gradients.plan.codec != "none" or weights.plan.codec != "none"
        shardings = [lane.start() for lane in lanes.values() if compresses and lane.control.world_size > 1]
        self._shardings = shardings
        self._finalizer = weakref.finalize(self, _stop, shardings, _EXIT_SECONDS)

        def abort() -> None:
            for sharding in shardings:
                sharding.abort()

        def end_backward(exposed_seconds: float) -> None:
            gradients.end_step(exposed_seconds)
            weights.end_step(0.0)

        backward = Backward(abort, end_backward)
        self._scatters = [
            GradientReduceScatter(unit, gradients, lane, backward)
            for unit, lane in zip(units, self._lanes, strict=True)
        ]
        self._gathers = [
            WeightAllGather(unit, weights, lane, backward)
            for unit, lane in zip(units, self._lanes, strict=True)
        ]
        for unit, gather, scatter in zip(units, self._gathers, self._scatters, strict=True):
            unit.install(gather, scatter, owner=self)
        if any(unit.replicas is not None for unit in units):
            _log.warning("HSDP: gradients are all-reduced between replicas by torch, uncompressed")
        self._step_hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks of the first module's group, instead of this rank's; then every rank must call it.

        Returns bits, weights, codec, weights_codec, kernel, exact, world_size, checks, and of gradients and weights
        together the `summary` of the meters, as for DistributedDataParallel, with a row for each parameter; under
        "gradients" and "weights" the same of each alone. A step is one backward pass that reduces gradients.
        bytes_source: "counted", or "analytic" for what torch sends itself (bits or weights "none": n − 1 chunks,
        padding included, for each of its calls). replica_wire_bytes: HSDP's all-reduce, calculated. native_gathers,
        native_gather_bytes: gathers of weights that no codec takes. The last three are not in the sums.
        """
        states = {
            "gradients": self._gradients.meter.state_dict(),
            "weights": self._weights.meter.state_dict(),
        }
        counts = self._counts()
        if all_ranks:
            everyone = gather_json({"states": states, "counts": counts}, self._control)
            states = {key: combined([one["states"][key] for one in everyone]) for key in states}
            counts = {key: sum(one["counts"][key] for one in everyone) for key in counts}
        natives = [c.plan.codec == "none" for c in (self._gradients, self._weights)]
        kernels = [c.codec.kernel_for(self._control.device) for c in (self._gradients, self._weights)]
        used = [kernel for kernel, native in zip(kernels, natives, strict=True) if not native]
        source = "analytic" if all(natives) else "counted, analytic" if any(natives) else "counted"
        return {
            "bits": self.plan.bits,
            "weights_bits": self.weights_plan.bits,
            "codec": self.plan.codec,
            "weights_codec": self.weights_plan.codec,
            "reason": self.plan.reason,
            "overrides": dict(self.plan.overrides),
            "kernel": used[0] if used else "none",
            "exact": self._gradients.exact and self._weights.exact,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "bytes_source": source,
            **counts,
            **summary(combined(list(states.values()))),
            **{key: summary(state) for key, state in states.items()},
        }

    def check(self) -> None:
        """Compares the weights that ranks compute with, bit by bit; every rank must call it. Raises RanksDiverged.

        Every rank holds another shard, so it gathers all units once more, the same way as in a forward pass, and
        compares a hash of every gathered parameter. Between replicas (HSDP) it compares the shards themselves.
        """
        for unit, gather, lane in zip(self._units, self._gathers, self._lanes, strict=True):
            gathered = gather.gathered()
            if gathered is not None:
                check_equal(gathered, lane.control, self._optimizer_steps)
            if unit.replicas is not None and unit.replicas.size() > 1:
                replicas = ProcessGroupTransport(unit.replicas, unit.device, self._timeout)
                check_equal(unit.shards(), replicas, self._optimizer_steps)
        self._checks += 1

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: plain numbers and strings, keyed by parameter name. Save one for each rank."""
        return {
            "version": _STATE_VERSION,
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "optimizer_steps": self._optimizer_steps,
            "counts": self._counts(),
            "gradients": self._gradients.state_dict(),
            "weights": self._weights.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`; every rank must call it, with its own.

        At another world size the counters start again from zero, which is logged. Raises PlanMismatch for other bits or
        weights, CheckpointError for another rank, model or version.
        """
        if state.get("version") != _STATE_VERSION or "weights" not in state:
            raise CheckpointError(
                "this is no compression state of a sharded model, or one of another version",
                expected=f"what FsdpCompression.state_dict() returns, version {_STATE_VERSION}",
                found=f"version {state.get('version')}, with {', '.join(sorted(state))}",
            )
        resized = state["world_size"] != self._control.world_size
        if not resized and state["rank"] != self._control.rank:
            raise CheckpointError(
                f"rank {self._control.rank} was given the compression state of rank {state['rank']}",
                fix="save state_dict() on every rank, and load each rank's own",
            )
        pairs = ((self._gradients, state["gradients"]), (self._weights, state["weights"]))
        for compressor, saved in pairs:
            compressor.check_state(saved)
        for compressor, saved in pairs:
            if resized:
                compressor.load_state_dicts([saved])
            else:
                compressor.load_state_dict(saved)
        self._optimizer_steps = state["optimizer_steps"]
        if resized:
            _log.warning(
                "compression state of %d ranks, restored on %d: the counters start again from zero",
                state["world_size"],
                self._control.world_size,
            )
        else:
            self._restore(state["counts"])

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads, destroys the groups it made, and gives the model torch's own collectives back.

        timeout: seconds that a peer may keep the threads waiting; then the connections are broken. A process that ends
        without close() ends its threads in the same way.
        """
        if self._step_hook is not None:
            self._step_hook.remove()
        for unit in self._units:
            unit.release()
        if self._finalizer.detach():
            for sharding in self._shardings:
                sharding.close(timeout)

    def _after_step(self, *_: Any) -> None:
        self._optimizer_steps += 1
        if self._shardings and self._check_every and self._optimizer_steps % self._check_every == 0:
            self.check()

    def _counts(self) -> dict[str, int]:
        return {
            "replica_wire_bytes": sum(scatter.replica_bytes for scatter in self._scatters),
            "native_gathers": sum(gather.native_gathers for gather in self._gathers),
            "native_gather_bytes": sum(gather.native_bytes for gather in self._gathers),
        }

    def _restore(self, counts: Mapping[str, int]) -> None:
        for scatter, gather in zip(self._scatters, self._gathers, strict=True):
            scatter.replica_bytes = gather.native_gathers = gather.native_bytes = 0
        self._scatters[0].replica_bytes = counts["replica_wire_bytes"]
        self._gathers[0].native_gathers = counts["native_gathers"]
        self._gathers[0].native_bytes = counts["native_gather_bytes"]


def _stop(shardings: Sequence[Any], timeout: float) -> None:
    for sharding in shardings:
        sharding.stop(timeout)


def _lanes(units: Sequence[Unit], timeout: float) -> dict[str, Lane]:
    lanes: dict[str, Lane] = {}
    for unit in units:
        if unit.group.group_name not in lanes:
            lanes[unit.group.group_name] = Lane(unit.group, unit.device, timeout)
    return lanes


def _values_sent(unit: Unit) -> int:
    """Values of its gradients that a rank sends in a step, the other ranks' chunks: on average, equal on all ranks."""
    return unit.trained_layout().bucket.numel * (unit.world_size - 1) // unit.world_size


def _check_supported(units: Sequence[Unit], model: nn.Module, check_every: int) -> None:
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
