"""What has to be right before a DistributedDataParallel model is compressed: options and parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import Plan, Residuals, Transport
from efficient_dl.errors import ConfigError, UnsupportedTensor
from efficient_dl.integrations.ddp_transport import divisible
from efficient_dl.integrations.nodes import Hierarchy, in_groups


def averaged_parameters(model: DistributedDataParallel) -> dict[str, nn.Parameter]:
    """By the names that they have without torch.compile, so that state fits with and without it."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.module.named_parameters()
        if name not in model.parameters_to_ignore
    }


def values_sent(parameters: Mapping[str, nn.Parameter], share: float) -> int:
    """Values that a rank sends in a step: the other ranks' shards, and its own to each of them."""
    return int(share * sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad))


def make_residuals(
    plan: Plan, parameters: Mapping[str, nn.Parameter], device: torch.device
) -> Residuals | None:
    """Where what packets leave out is kept; None without error feedback."""
    if not plan.error_feedback:
        return None
    return Residuals({name: parameter.numel() for name, parameter in parameters.items()}, device)


def join_check(model: DistributedDataParallel) -> Callable[[], bool]:
    """Whether DDP is inside of its join() now; keeps no reference to the model."""
    reference = weakref.ref(model)

    def joins() -> bool:
        model = reference()
        return model is not None and model._join_config.enable

    return joins


def check_hierarchy(
    hierarchy: Hierarchy, plan: Plan, shadow: bool, transport: Transport | Literal["mpi"] | None
) -> None:
    """Raises ConfigError where a hierarchy does not go with the other options."""
    if in_groups(hierarchy):
        if transport is not None and not isinstance(transport, str):
            divisible(transport)
    elif hierarchy is not None and transport is not None:
        raise ConfigError(
            "a hierarchy makes its own groups of ranks, out of the process group",
            found=f"transport={transport!r}",
            fix="leave one of the two out",
        )
    if hierarchy is not None and (shadow or plan.codec == "none"):
        raise ConfigError(
            "a hierarchy needs our own reduction",
            found="shadow=True" if shadow else 'bits="none"',
            fix='leave hierarchy out, or use bits="identity" as the yardstick',
        )


def check_supported(
    model: DistributedDataParallel, parameters: Mapping[str, nn.Parameter], check_every: int
) -> None:
    """Raises ConfigError or UnsupportedTensor for a model that cannot be compressed."""
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters.values()):
        raise ConfigError(
            "the optimizer steps inside of the backward pass",
            found="torch's _apply_optimizer_in_backward, which needs DDP's only communication hook",
            fix="step the optimizer after backward(), or leave compress() out",
        )
    if getattr(model, "_use_python_reducer", False):
        raise ConfigError(
            "DDP was made with torch._dynamo.config.optimize_ddp = 'python_reducer', which has no buckets",
            fix="make it with optimize_ddp = 'ddp_optimizer', torch's default",
        )
    if getattr(model, "_comm_hooks", None):
        raise ConfigError(
            "the model has a communication hook already", fix="call compress() once, and no other hook"
        )
    if check_every < 0:
        raise ConfigError("check_every is negative", expected="optimizer steps, or 0", found=str(check_every))
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise UnsupportedTensor("the model's parameters must be on one device", found=", ".join(devices))
