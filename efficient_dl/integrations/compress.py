"""`compress`: one call for every kind of distributed model that we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.errors import ConfigError
from efficient_dl.integrations.ddp import compress_ddp
from efficient_dl.integrations.ddp_compression import Compression
from efficient_dl.integrations.deepspeed import check_is_own, compress_engine, is_engine
from efficient_dl.integrations.deepspeed_compression import EngineCompression
from efficient_dl.integrations.fsdp import compress_fsdp
from efficient_dl.integrations.fsdp_compression import FsdpCompression


def compress(
    model: Any,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float | None = None,
    **options: Any,
) -> Compression | FsdpCompression | EngineCompression:
    """Compresses what a distributed model sends: gradients, and under FSDP2 the weights, too.

    Call it once, on every rank, after wrapping the model and before its first step; the ranks compare what they are
    about to do first. The training script stays as it is.

    model: a DistributedDataParallel, a model to which torch.distributed.fsdp.fully_shard was applied, or a DeepSpeed
        engine.
    optimizer: its steps trigger the comparison of parameters between ranks; without one, call `check()` yourself. A
        DeepSpeed engine has its own, and takes no other.
    bits: of gradients. "none" (the native collective, untouched), "identity" (our reduction, uncompressed),
        "lossless", a number of bits a value (2.0), a codec's name ("grid:0.5", "int8", ...), or "auto", the default.
    options: what `ddp.compress_ddp`, `fsdp.compress_fsdp` or `deepspeed.compress_engine` take beside, explained there.
        All three: check_every, timeout, kernel, extra, error_feedback, messages, shadow, max_relative_error,
        on_alarm, floor_bits, replan.
        DistributedDataParallel and FSDP2: overrides, max_error, bytes_per_step, scaler, backward_seconds.
        DistributedDataParallel and DeepSpeed: scale.
        DistributedDataParallel: hierarchy, transport, group, measurements.
        FSDP2: weights, axes.

    Raises ConfigError (also for an option that this kind of model does not have), UnsupportedTensor, PlanMismatch
    (ranks differ), TransportError.

    Example:
        compression = edl.compress(DistributedDataParallel(model), optimizer, bits=2.0)
        ...                                # train as before
        print(compression.stats()["ratio"])
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(DistributedDataParallel(...))
    kind, adapter = _adapter_for(model)
    known = inspect.signature(adapter).parameters
    given = {"bits": bits, "optimizer": optimizer}
    options |= {name: value for name, value in given.items() if value is not None}
    if kind != "DistributedDataParallel" and options.get("messages") == "auto":
        del options["messages"]  # their planner has exact ones alone
    if kind == "DeepSpeed" and (own := options.pop("optimizer", None)) is not None:
        check_is_own(model, own)
    for option in options:
        if option not in known:
            names = [name for name in known if name not in ("model", "engine")]
            raise ConfigError(
                f"{option} is not supported for {kind}", expected=", ".join(names), fix="leave it out"
            )
    return adapter(model, **options)


def _adapter_for(model: Any) -> tuple[str, Callable[..., Any]]:
    if isinstance(model, DistributedDataParallel):
        return "DistributedDataParallel", compress_ddp
    if isinstance(model, FSDPModule):
        return "FSDP2", compress_fsdp
    if is_engine(model):
        return "DeepSpeed", compress_engine
    raise ConfigError(
        f"compress() cannot take a {type(model).__name__}",
        expected="a torch.nn.parallel.DistributedDataParallel, a model after torch.distributed.fsdp.fully_shard, "
        "or a DeepSpeed engine",
        fix="compress(DistributedDataParallel(model), optimizer), or fully_shard(model) first",
    )
