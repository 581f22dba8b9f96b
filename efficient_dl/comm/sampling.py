"""A part of a model's values that stands for all of them: blocks from all over every parameter.

What packets cost depends on how spreads differ from one parameter to the next, and inside of one (the rows of an
embedding, say), so a model's last values tell little of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.comm.layout import BLOCK_NUMEL

_GOLDEN = 0.6180339887498949  # its multiples' fractions are spread evenly


class Spread:
    """Takes at most `limit` of `numel` values, in tensors that are shown to it one after the other.

    It takes whole blocks, about as far from each other everywhere; a tensor shorter than a block counts as one. Of
    fewer values than limit it takes all. The same tensors in the same order lead to the same places.
    """

    def __init__(self, numel: int, limit: int) -> None:
        self._share = limit / max(numel, 1)
        self._limit = limit
        self.begin()

    def begin(self) -> None:
        """Starts anew."""
        self._blocks = 0
        self.taken = 0

    def numel_of(self, numel: int) -> int:
        """How many values to take of the next tensor, which has so many."""
        left = self._limit - self.taken
        if self._share < 1:
            blocks = max(numel // BLOCK_NUMEL, 1 if numel else 0)
            before = int(self._share * self._blocks)
            self._blocks += blocks
            numel = min((int(self._share * self._blocks) - before) * BLOCK_NUMEL, numel)
        numel = min(numel, left)
        self.taken += numel
        return numel

    def take(self, x: Tensor) -> Tensor | None:
        """Returns a copy of values of x, 1-D; None: none of them."""
        numel = self.numel_of(x.numel())
        blocks, taken = x.numel() // BLOCK_NUMEL, numel // BLOCK_NUMEL
        if numel == 0:
            return None
        if taken >= blocks or numel % BLOCK_NUMEL:
            return x[:numel].clone()
        number = torch.arange(taken, device=x.device)
        # Somewhere in each stride: no length of a row falls in with it.
        within = (number * _GOLDEN % 1 * (blocks // taken)).long()
        places = number * blocks // taken + within
        return x[: blocks * BLOCK_NUMEL].view(blocks, BLOCK_NUMEL)[places].view(-1)
