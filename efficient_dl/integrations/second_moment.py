"""Step sizes after Adam's second moment: a coarse step where gradients vary much, a fine one where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from efficient_dl.comm import Plan
from efficient_dl.errors import ConfigError

_SMALLEST = 0.01  # of the parameter's root mean square: values that never had a gradient keep a step


class SecondMoment:
    """What gradients are divided by before they are coded, and multiplied by afterwards: √v of an Adam-like optimizer.

    v is the same on every rank under DDP, bit for bit, so it need not be sent. Scaled so, all values of a parameter
    have about the same spread, and one step for all of them ("grid:RATE") asks for few bits where √v is large.
    Parameters that the plan codes otherwise, and those without a second moment yet (before the first step), have 1.
    Measured against steps of blocks in docs/experiments.md.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter], plan: Plan
    ) -> None:
        if optimizer is None or not _has_second_moment(optimizer):
            raise ConfigError(
                'scale="second_moment" needs an optimizer with a second moment',
                expected="Adam, AdamW or another one with exp_avg_sq in its state",
                found=type(optimizer).__name__,
                fix='pass the optimizer, or use scale="local"',
            )
        self._optimizer = optimizer
        self._parameters = {
            name: parameter for name, parameter in parameters.items() if plan.codec_for(name) == plan.codec
        }

    def of(self, names: Sequence[str], numels: Sequence[int], like: Tensor) -> Tensor:
        """The divisors of a bucket's values, float32, 1-D on like's device."""
        divisors = torch.ones(sum(numels), dtype=torch.float32, device=like.device)
        for name, part in zip(names, divisors.split(list(numels)), strict=True):
            parameter = self._parameters.get(name)
            moment = None if parameter is None else self._optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if moment is not None:
                _divisor(moment.reshape(-1).float(), part)
        return divisors


def _divisor(moment: Tensor, out: Tensor) -> None:
    root = torch.sqrt(moment)
    mean = torch.sqrt(moment.mean())
    # A parameter whose gradients were all zero keeps 1; so does one whose moment is not finite.
    usable = (mean > 0) & torch.isfinite(mean)
    out.copy_(torch.where(usable, torch.maximum(root, _SMALLEST * mean), torch.ones_like(root)))


def _has_second_moment(optimizer: torch.optim.Optimizer) -> bool:
    if any("exp_avg_sq" in state for state in optimizer.state.values()):
        return True
    return "betas" in optimizer.defaults and not optimizer.state
