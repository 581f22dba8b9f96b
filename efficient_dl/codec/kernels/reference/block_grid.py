"""The grid of blocks over a flat tensor: 256 values each, restarting at every parameter."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_VALUES = 256


def count_blocks(segments: tuple[int, ...]) -> int:
    """Blocks of a tensor of these parameters."""
    return sum(-(-segment // BLOCK_VALUES) for segment in segments)


class BlockGrid:
    """Where the blocks of a flat tensor lie.

    segments: the parameters' lengths. `lengths`: int64 (num_blocks,), values of each block; `mask`: bool
    (num_blocks, 256), which places of the padded form hold values.
    """

    def __init__(self, segments: tuple[int, ...], device: torch.device) -> None:
        starts: list[Tensor] = []
        ends: list[Tensor] = []
        offset = 0
        for segment in segments:
            start = torch.arange(offset, offset + segment, BLOCK_VALUES, device=device)
            offset += segment
            starts.append(start)
            ends.append((start + BLOCK_VALUES).clamp(max=offset))
        empty = torch.empty(0, dtype=torch.int64, device=device)
        start = torch.cat([empty, *starts])
        self.numel = offset
        self.lengths = torch.cat([empty, *ends]) - start
        place = torch.arange(BLOCK_VALUES, device=device)
        self.mask = place < self.lengths[:, None]
        self._index = start[:, None] + place

    @property
    def num_blocks(self) -> int:
        """Blocks in the tensor."""
        return self.lengths.numel()

    def gather(self, x: Tensor) -> Tensor:
        """The flat tensor as (num_blocks, 256), zeros behind the end of short blocks."""
        return torch.where(self.mask, x[self._index.clamp(max=max(self.numel - 1, 0))], 0)

    def scatter(self, blocks: Tensor) -> Tensor:
        """The inverse of `gather`."""
        flat = blocks.new_empty(self.numel)
        flat[self._index[self.mask]] = blocks[self.mask]
        return flat

    def select(self, chosen: Tensor) -> BlockGrid:
        """The blocks with these indices only, for measuring; it cannot scatter."""
        grid = BlockGrid((), chosen.device)
        grid.lengths, grid.mask = self.lengths[chosen], self.mask[chosen]
        return grid
