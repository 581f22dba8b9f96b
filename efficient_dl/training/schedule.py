"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from efficient_dl.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of a run of `steps` steps.

    It rises linearly over warmup_steps to lr. "constant" stays there; "cosine" falls along half a cosine,

        lr · (share + (1 − share) · (1 + cos(π t)) / 2),   t from 0 after the warm-up to 1 at the last step,

    share being final_lr_share. Source: Loshchilov and Hutter 2017, without restarts.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    falling_steps = max(1, steps - 1 - config.warmup_steps)
    t = min(1.0, (step - config.warmup_steps) / falling_steps)
    share = config.final_lr_share
    return config.lr * (share + (1.0 - share) * 0.5 * (1.0 + math.cos(math.pi * t)))
