"""A partition as one rank holds it: trained with its own optimizer, or frozen and only passed through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from efficient_dl.local_learning.block import LocalBlock


class StepOptimizer(Protocol):
    """What a partition's optimizer must do."""

    def step(self, lr: float) -> None:
        """Take one step with this learning rate."""
        ...

    def zero_grad(self) -> None:
        """Set all gradients to none."""
        ...


@dataclass
class Trained:
    """A partition whose parameters learn from its own loss.

    parameters: that its optimizer steps.
    forward: the block, or the DistributedDataParallel around it, which averages gradients over the partition's ranks.
    clip: the largest norm of the partition's gradient; 0.0: not clipped.
    borrows: whether the block also uses weights of an earlier partition, which its loss must not reach.
    """

    index: int
    block: LocalBlock
    forward: nn.Module
    optimizer: StepOptimizer
    parameters: Sequence[nn.Parameter]
    clip: float = 0.0
    borrows: bool = False

    @property
    def reached(self) -> list[nn.Parameter] | None:
        """What backward passes may give gradients to; None: whatever they reach."""
        return [one for one in self.parameters if one.requires_grad] if self.borrows else None

    @contextlib.contextmanager
    def reducing(self, last: bool) -> Iterator[None]:
        """Only the step's last backward pass on this rank reduces gradients; both passes run inside."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            yield
        else:
            with self.forward.no_sync():
                yield

    def step(self, lr: float) -> None:
        """One optimizer step, after which no gradient is kept."""
        if self.clip > 0:
            clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step(lr)
        self.optimizer.zero_grad()


@dataclass
class Frozen:
    """A partition that is passed through: in eval mode, without gradients, optimizer or head."""

    index: int
    body: nn.Module

    def __post_init__(self) -> None:
        self.body.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


Held = Trained | Frozen


def body_of(held: Held) -> nn.Module:
    """The partition's layers."""
    return held.body if isinstance(held, Frozen) else held.block.body
