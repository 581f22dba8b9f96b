"""Step sizes after Adam's second moment: a coarse step where gradients vary much, a fine one where they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from efficient_dl.comm import Plan
from efficient_dl.errors import ConfigError

_SMALLEST = 1e-3  # of the parameter's largest √v: values that never had a gradient keep a step


class SecondMoment:
    """What gradients are divided by before they are coded, and multiplied by afterwards: √v of an Adam-like optimizer.

    v is the same on every rank under DDP, bit for bit, so it need not be sent; nor is anything computed from it whose
    last bits could depend on a rank's number of threads. Scaled so, all values of a parameter have about the same
    spread, and one step for all of them ("grid:RATE") asks for few bits where √v is large.

    Parameters whose v is zero or missing (before the first step, another optimizer's, behind a branch that starts at
    zero) are `unscaled`: beside scaled values theirs would be lost, so they travel in packets of their own. Those that
    an override names keep the divisor 1. Measured against steps of blocks in docs/experiments.md.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter], plan: Plan
    ) -> None:
        if optimizer is None or not _may_have_second_moment(optimizer):
            raise _unfit(optimizer)
        self._optimizer = optimizer
        self._parameters = {
            name: parameter for name, parameter in parameters.items() if plan.override_for(name) is None
        }
        self._largest: dict[str, float] = {}
        self.unscaled = frozenset(self._parameters)

    def begin_step(self) -> None:
        """Looks at the optimizer's state, before a backward pass's first bucket. Waits for a GPU once."""
        moments = {name: moment for name in self._parameters if (moment := self._moment(name)) is not None}
        if self._optimizer.state and not moments and not self._has_any():
            raise _unfit(self._optimizer)
        names = list(moments)
        largest = torch.stack([moments[name].amax().float() for name in names]).tolist() if names else []
        self._largest = {
            name: value for name, value in zip(names, largest, strict=True) if 0 < value < math.inf
        }
        self.unscaled = frozenset(self._parameters.keys() - self._largest.keys())

    def of(self, names: Sequence[str], numels: Sequence[int], like: Tensor) -> Tensor:
        """The divisors of a bucket's values, float32, 1-D on like's device."""
        divisors = torch.ones(sum(numels), dtype=torch.float32, device=like.device)
        for name, part in zip(names, divisors.split(list(numels)), strict=True):
            moment = self._moment(name)
            if name in self._largest and moment is not None:
                floor = _SMALLEST * math.sqrt(self._largest[name])
                values = _as_in_buckets(moment, self._parameters[name])
                torch.sqrt(values.float(), out=part).clamp_(min=floor)
        return divisors

    def _moment(self, name: str) -> Tensor | None:
        parameter = self._parameters.get(name)
        return None if parameter is None else self._optimizer.state.get(parameter, {}).get("exp_avg_sq")

    def _has_any(self) -> bool:
        return any("exp_avg_sq" in state for state in self._optimizer.state.values())


def _as_in_buckets(moment: Tensor, parameter: Tensor) -> Tensor:
    """1-D, in the order in which DDP's buckets hold the parameter's gradient: that of its memory, if it has no gaps."""
    order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    numel = 1
    for dimension in reversed(order):
        if parameter.size(dimension) != 1 and parameter.stride(dimension) != numel:
            return moment.reshape(-1)
        numel *= parameter.size(dimension)
    return moment.permute(order).reshape(-1)


def _may_have_second_moment(optimizer: torch.optim.Optimizer) -> bool:
    """By its state; before the first step by its settings, which `begin_step` verifies afterwards."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        return False  # every rank has another part of the state
    if optimizer.state:
        return any("exp_avg_sq" in state for state in optimizer.state.values())
    return "betas" in optimizer.defaults


def _unfit(optimizer: torch.optim.Optimizer | None) -> ConfigError:
    return ConfigError(
        'scale="second_moment" needs an optimizer with a second moment on every rank',
        expected="Adam, AdamW or another one with exp_avg_sq in its state",
        found=type(optimizer).__name__,
        fix='pass the optimizer, or use scale="local"',
    )
