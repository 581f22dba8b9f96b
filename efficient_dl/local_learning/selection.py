"""Which examples a partition hands on: those that it has not learned yet, or for comparison any."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.held import Trained
from efficient_dl.objectives import make_objective

RowLoss = Callable[[Tensor, Tensor], Tensor]
_FEWEST = 2  # what batch norm and similarity matching take


@dataclass
class Selection:
    """Every partition in training hands a share of its examples on to the next one, which learns from no others.

    So partition k learns from about keep^k of a batch. by: "loss", those with the largest local loss of the partition
    that hands them on; "random", the first ones of the batch, a random choice where batches are drawn at random: the
    control. A choice depends on the weights and the batch alone: there is nothing to save for a resume.
    objective: a name of efficient_dl.objectives.OBJECTIVES, whose loss of an example (the mean over its tokens) counts.
    After Øland's talk (in layer-wise training examples become redundant); choosing by loss, after Jiang et al. 2019
    (selective backprop, arXiv 1910.00762). Raises ConfigError.
    """

    keep: float
    by: Literal["loss", "random"] = "loss"
    objective: str = "cross-entropy"
    _row_loss: RowLoss = field(init=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0 or self.by not in ("loss", "random"):
            raise ConfigError(
                "this is no way to keep examples",
                expected='a share above 0 and at most 1, by "loss" or "random"',
                found=f"{self.keep!r}, by {self.by!r}",
            )
        self._row_loss = make_objective(self.objective, reduction="none")

    def of(self, one: Trained, targets: Tensor) -> Tensor | None:
        """Positions that a partition hands on after its forward pass on these targets, ascending; None: all."""
        count = max(min(_FEWEST, len(targets)), math.ceil(self.keep * len(targets)))
        if count == len(targets):
            return None
        if self.by == "random":
            return torch.arange(count, device=targets.device)
        return self.hardest(one.block.logits(), targets, count)

    @torch.no_grad()
    def hardest(self, logits: Tensor, targets: Tensor, count: int) -> Tensor:
        """Positions of the `count` examples with the largest loss, ascending; of equal ones the first.

        logits: (batch, ..., classes), targets: int64 (batch, ...). A loss that is NaN counts as the largest.
        """
        losses = self._row_loss(logits.float().flatten(0, -2), targets.flatten())
        of_example = losses.reshape(len(targets), -1).mean(1)
        return of_example.argsort(descending=True, stable=True)[:count].sort().values
