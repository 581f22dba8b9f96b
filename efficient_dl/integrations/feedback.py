"""What "auto" means for step sizes and error feedback, and when feedback cannot be had."""

from __future__ import annotations

import torch

from efficient_dl.comm.plan import Scale
from efficient_dl.errors import ConfigError


def automatic_scale(is_sgd: bool, device: torch.device, bounded: bool) -> Scale:
    """One step for the whole model where it helps and can be had: SGD, whose updates keep the gradients' sizes."""
    return "global" if is_sgd and device.type == "cpu" and not bounded else "local"


def feeds_if_lossy(wish: bool | str, is_sgd: bool, scale: str) -> bool:
    """Whether lossy packets' errors are fed back without having been asked for: where small values share a step."""
    return wish == "auto" and is_sgd and scale == "global"


def is_asked_for(
    wish: bool | str, scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer | None
) -> bool:
    """Whether error feedback was asked for; raises ConfigError where it cannot be had."""
    if wish not in (True, False, "auto"):
        raise ConfigError("unknown error_feedback", expected='True, False or "auto"', found=repr(wish))
    if wish is True and scaler is not None and optimizer is None:
        raise ConfigError(
            "error feedback with a GradScaler needs the optimizer, to know which steps it skips",
            fix="compress(model, optimizer, scaler=scaler, ...)",
        )
    return wish is True
