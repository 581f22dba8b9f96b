"""DeepSpeed with entropy-coded gradients: `compress_engine`, and the `EngineCompression` it returns.

ZeRO stages 0, 1 and 2. What is replaced inside the engine, and how, is in deepspeed_plugs.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from efficient_dl.comm import (
    Compressor,
    Plan,
    ProcessGroupTransport,
    check_equal,
    combined,
    gather_json,
    handshake,
    native_tally,
    summary,
)
from efficient_dl.errors import ConfigError, EdlError, PlanMismatch
from efficient_dl.integrations.deepspeed_checkpoint import METHODS as CHECKPOINT_METHODS
from efficient_dl.integrations.deepspeed_checkpoint import CheckpointFiles
from efficient_dl.integrations.deepspeed_plugs import (
    EnginePlug,
    Reducer,
    ZeroPlug,
    check_signatures,
    check_version,
    install,
    remove,
)
from efficient_dl.integrations.deepspeed_settings import Settings, check_supported
from efficient_dl.integrations.facts import common_facts


def is_engine(model: object) -> bool:
    """Whether it is a DeepSpeedEngine; never imports deepspeed."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)


def compress_engine(
    engine: Any,
    bits: str | float | None = None,
    *,
    check_every: int | None = None,
    timeout: float | None = None,
    kernel: str | None = None,
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
        number of bits a value (2.0), or "auto" (the default).
    check_every: compare all parameters of all ranks, bit by bit, after every so many optimizer steps (50); 0: never, as
        with bits="none".
    timeout: seconds (300) after which an unfinished transfer, the wait for the slowest rank included, raises
        TransportError and names the rank.
    kernel: which kernels code CPU tensors, as in `make_codec`.
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
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    control = ProcessGroupTransport(engine.seq_data_parallel_group, device, timeout or Settings().timeout)
    facts = _facts(engine, parameters, extra or {})
    try:
        version = sys.modules["deepspeed"].__version__
        check_version(version)
        check_supported(engine)
        settings = Settings.of(engine._config._param_dict, **_given(bits, check_every, timeout, kernel))
        plug = ZeroPlug if hasattr(engine.optimizer, "average_tensor") else EnginePlug
        check_signatures(type(engine.optimizer if plug is ZeroPlug else engine), plug.methods, version)
        check_signatures(type(engine), CHECKPOINT_METHODS | {"step": ("self", "lr_kwargs")}, version)
        if "step" in vars(engine):
            raise ConfigError("the engine is compressed already", fix="call compress_engine() once")
        compressor = Compressor(Plan.of(settings.bits), list(parameters), settings.kernel)
    except EdlError as error:
        handshake(facts, control, failure=error)
        raise
    control.timeout = float(settings.timeout)
    facts["plan"] = {"bits": compressor.plan.bits, "codec": compressor.plan.codec}
    facts["check_every"] = settings.check_every
    facts["kernel"] = compressor.codec.kernel_for(device).partition("-")[0]
    handshake(facts, control)
    return EngineCompression(engine, compressor, control, plug, settings.check_every)


class EngineCompression:
    """Compressed reduction of one engine's gradients, as `compress_engine` set it up."""

    def __init__(
        self,
        engine: Any,
        compressor: Compressor,
        control: ProcessGroupTransport,
        plug: type[EnginePlug] | type[ZeroPlug],
        check_every: int,
    ) -> None:
        self.plan = compressor.plan
        self._engine = engine
        self._compressor = compressor
        self._control = control
        self._check_every = check_every
        self._parameters = dict(engine.module.named_parameters())
        self._checks = 0
        self._transport: ProcessGroupTransport | None = None
        self._plug: EnginePlug | ZeroPlug | None = None
        self._reducer: Reducer | None = None
        if self.plan.codec != "none" and control.world_size > 1:
            names = {id(parameter): name for name, parameter in self._parameters.items()}
            self._transport = control.sibling()
            self._reducer = Reducer(compressor, self._transport)
            self._plug = plug(engine, names, self._reducer)
            install(self._plug)
        self._native_step = engine.step
        files = CheckpointFiles(engine, self, control)
        self._replaced = {
            "step": self._step,
            "save_checkpoint": files.save_checkpoint,
            "load_checkpoint": files.load_checkpoint,
        }
        for name, method in self._replaced.items():
            setattr(engine, name, method)

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.

        Returns bits, codec, reason, kernel, exact, shadow (False), world_size, checks, bytes_source, and `summary` of
        the meter, as DDP's `Compression.stats` does. A step is one optimizer step, skipped ones included. With
        reduce_scatter, raw_bytes is what the identity codec would send to the owners, about half of an all-reduce.
        bytes_source is "counted", or with bits="none" "analytic": 2 (n − 1) / n of the gradients' bytes for every
        all-reduce of them that DeepSpeed makes.
        """
        state = self._compressor.meter.state_dict()
        if all_ranks:
            state = combined(gather_json(state, self._control))
        native = self.plan.codec == "none"
        return {
            "bits": self.plan.bits,
            "codec": self.plan.codec,
            "reason": self.plan.reason,
            "kernel": "none" if native else self._compressor.codec.kernel_for(self._control.device),
            "exact": self._compressor.codec.exact,
            "shadow": False,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "bytes_source": "analytic" if native else "counted",
            **summary(state),
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged."""
        check_equal(self._parameters, self._control, self._engine.global_steps)
        self._checks += 1

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: plain numbers and strings, keyed by parameter name. Checkpoints have it already."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "compressor": self._compressor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`.

        Raises PlanMismatch if it is another rank's, of another number of ranks or plan; CheckpointError if it is of
        another model.
        """
        place = (state["rank"], state["world_size"])
        if place != (self._control.rank, self._control.world_size):
            raise PlanMismatch(
                "the compression state belongs to another rank",
                expected=f"rank {self._control.rank} of {self._control.world_size}",
                found=f"rank {place[0]} of {place[1]}",
                fix="load every rank's own state; at another number of ranks leave it out",
            )
        self._compressor.load_state_dict(state["compressor"])
        self._checks = state["checks"]

    def close(self) -> None:
        """Gives the engine its own methods back, and the process group up; the engine then trains uncompressed."""
        if not self._replaced:
            return
        for name in self._replaced:
            delattr(self._engine, name)
        self._replaced = {}
        if self._plug is not None:
            remove(self._plug)
        if self._transport is not None:
            self._transport.close()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        engine, steps = self._engine, self._engine.global_steps
        result = self._native_step(*args, **kwargs)
        if engine.global_steps > steps:
            self._after_step()
        return result

    def _after_step(self) -> None:
        exposed = 0.0
        if self._reducer is not None:
            exposed, self._reducer.exposed_seconds = self._reducer.exposed_seconds, 0.0
        elif self.plan.codec == "none":
            self._count_native()
        self._compressor.end_step(exposed)
        is_due = self._check_every and self._engine.global_steps % self._check_every == 0
        if is_due and self._reducer is not None:
            self.check()

    def _count_native(self) -> None:
        engine = self._engine
        trained = {name: p.numel() for name, p in self._parameters.items() if p.requires_grad}
        itemsizes: dict[str, int] = dict.fromkeys(trained, int(engine.communication_data_type.itemsize))
        every_micro_step = engine.zero_optimization_partition_gradients()
        for _ in range(engine.gradient_accumulation_steps() if every_micro_step else 1):
            self._compressor.meter.add(native_tally(trained, itemsizes, self._control.world_size))


def _given(
    bits: str | float | None, check_every: int | None, timeout: float | None, kernel: str | None
) -> dict[str, Any]:
    return {"bits": bits, "check_every": check_every, "timeout": timeout, "kernel": kernel}


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
