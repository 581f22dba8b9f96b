"""`compress`: one call for every kind of distributed model that we know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import DEFAULT_TIMEOUT_SECONDS
from efficient_dl.errors import ConfigError
from efficient_dl.integrations import ddp
from efficient_dl.integrations.ddp import Compression
from efficient_dl.integrations.fsdp import FsdpCompression, compress_fsdp


def compress(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float = "auto",
    *,
    weights: str | float | None = None,
    overrides: Mapping[str, str | float] | None = None,
    max_error: float | None = None,
    bytes_per_step: int | None = None,
    error_feedback: bool | Literal["auto"] = "auto",
    scaler: torch.amp.GradScaler | None = None,
    shadow: bool = False,
    group: dist.ProcessGroup | None = None,
    check_every: int = 50,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    kernel: str = "auto",
    extra: Mapping[str, Any] | None = None,
) -> Compression | FsdpCompression:
    """Compresses what a distributed model sends: gradients, and under FSDP2 the weights, too.

    Call it once, on every rank, after wrapping the model and before its first step; the ranks compare what they are
    about to do first. The training script stays as it is.

    model: a DistributedDataParallel (`ddp.compress`), or one to which torch.distributed.fsdp.fully_shard was applied
        (`fsdp.compress_fsdp`).
    optimizer: its steps trigger the comparison of parameters between ranks; without one, call `check()` yourself.
    bits: of gradients. "none" (the native collective, untouched), "identity" (our reduction, uncompressed), "lossless",
        a number of bits a value (2.0), a codec's name ("grid:0.5", "int8", ...), or "auto".
    weights: of what FSDP2 all-gathers, as bits. None is "lossless": the native result, bit for bit. With a lossy codec
        all ranks, the owner too, compute with the decoded weights; the optimizer keeps the exact ones.
    overrides: other wishes for parameters' gradients by shell-style patterns of their names, the first match counts:
        {"*.bias": "none", "lm_head.*": 4.0}. "none" sends them uncompressed in the same messages.
    max_error: instead of bits: as many as keep the relative error of every packet, ‖decoded − x‖ / ‖x‖, within this
        (0.0125 to 1). Encodes up to a few times where gradients change, and measures every packet.
    bytes_per_step: instead of bits: as many as let this rank send so many bytes of gradients in a step, on average.
    check_every: compare all parameters of all ranks, bit by bit, after every so many optimizer steps; 0: never. Under
        FSDP2 that gathers the weights once more.
    timeout: seconds after which an unfinished transfer, the wait for the slowest rank included, raises TransportError
        and names the rank: longer than anything one rank does alone, such as an evaluation.
    kernel: which kernels code CPU tensors, as in `make_codec`.
    extra: further facts that must agree on all ranks, for example {"data": hash}; compared as text.
    error_feedback, scaler, shadow, group: of DistributedDataParallel only; explained in `ddp.compress`. FSDP2 has no
        error feedback, whatever the optimizer: residuals take 8 bytes a value of the whole model on every rank.

    Raises ConfigError, UnsupportedTensor, PlanMismatch (ranks differ), TransportError.

    Example:
        compression = edl.compress(DistributedDataParallel(model), optimizer, bits=2.0)
        ...                                # train as before
        print(compression.stats()["ratio"])
    """
    if isinstance(model, DistributedDataParallel):
        if weights is not None:
            raise ConfigError(
                "DistributedDataParallel sends no weights", found=f"weights={weights!r}", fix="leave it out"
            )
        return ddp.compress(
            model,
            optimizer,
            bits,
            overrides=overrides,
            max_error=max_error,
            bytes_per_step=bytes_per_step,
            error_feedback=error_feedback,
            scaler=scaler,
            shadow=shadow,
            group=group,
            check_every=check_every,
            timeout=timeout,
            kernel=kernel,
            extra=extra,
        )
    if isinstance(model, FSDPModule):
        _refuse(shadow=shadow, group=group is not None, error_feedback=error_feedback is True)
        return compress_fsdp(
            model,
            optimizer,
            bits,
            weights="lossless" if weights is None else weights,
            overrides=overrides,
            max_error=max_error,
            bytes_per_step=bytes_per_step,
            check_every=check_every,
            timeout=timeout,
            kernel=kernel,
            extra=extra,
        )
    raise ConfigError(
        f"compress() cannot take a {type(model).__name__}",
        expected="a torch.nn.parallel.DistributedDataParallel, or a model after torch.distributed.fsdp.fully_shard",
        fix="compress(DistributedDataParallel(model), optimizer), or fully_shard(model) first",
    )


def _refuse(**wanted: bool) -> None:
    for option in (name for name, wants in wanted.items() if wants):
        raise ConfigError(
            f"{option} is not supported for FSDP2",
            expected="a DistributedDataParallel, or compress() without it",
            fix={
                "shadow": 'compare stats() of runs with bits="none" and with compression',
                "group": "pass the mesh to fully_shard; its groups are taken",
                "error_feedback": "raise the bits: residuals would take 8 bytes a value of the whole model",
            }[option],
        )
