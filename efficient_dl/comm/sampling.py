"""A part of a model's values that stands for all of them: blocks from all over every parameter.

What packets cost depends on how spreads differ from one parameter to the next, and inside of one (the rows of an
embedding, say), so a model's last values tell little of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.comm.layout import BLOCK_NUMEL


def spread_numel(numel: int, share: float) -> int:
    """How many of so many values `spread_blocks` takes."""
    blocks = numel // BLOCK_NUMEL
    if blocks == 0 or share >= 1:
        return numel
    return BLOCK_NUMEL * min(max(round(share * blocks), 1), blocks)


def spread_blocks(x: Tensor, share: float) -> Tensor:
    """Returns a copy of about so large a share of x, 1-D: whole blocks at equal distances, one at least.

    A tensor shorter than a block is taken whole.
    """
    numel = spread_numel(x.numel(), share)
    if numel == x.numel():
        return x.clone()
    blocks, taken = x.numel() // BLOCK_NUMEL, numel // BLOCK_NUMEL
    places = torch.arange(taken, device=x.device) * blocks // taken
    return x[: blocks * BLOCK_NUMEL].view(blocks, BLOCK_NUMEL)[places].view(-1)
