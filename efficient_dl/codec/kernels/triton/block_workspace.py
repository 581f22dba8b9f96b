"""The memory that encoding on a GPU needs besides the tensor and its packet."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference.block_grid import BLOCK_VALUES
from efficient_dl.codec.kernels.reference.symbols import Mode
from efficient_dl.codec.kernels.reference.tiles import LANES
from efficient_dl.codec.kernels.triton.block_search import MEASUREMENTS

_ALPHABET = 256
_TABLE_WORDS = 104


def cut(room: Tensor, *sizes: int) -> list[Tensor]:
    """The parts of a 1-D tensor, one behind the other."""
    parts: list[Tensor] = []
    for size in sizes:
        parts.append(room[:size])
        room = room[size:]
    return parts


class Workspace:
    """Allocated by torch on the current stream, so that a CUDA graph holds it. What needs zeros is set to zero.

    `block_quantize` and `block_encode` describe the tensors, which have their arguments' names.
    """

    def __init__(
        self, num_blocks: int, num_tiles: int, tile_blocks: int, mode: Mode, device: torch.device
    ) -> None:
        self.mode = mode
        self.num_blocks, self.num_tiles, self.tile_blocks_each = num_blocks, num_tiles, tile_blocks
        rows = mode.rows_per_block
        # A tile with more words than half a word a symbol is stored instead.
        self.slot_words = tile_blocks * rows * LANES // 2

        def room(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        zeros = torch.zeros(MEASUREMENTS + _ALPHABET + _TABLE_WORDS + 1, dtype=torch.int32, device=device)
        self.measured, self.counts, self.table, self.largest_code = cut(
            zeros, MEASUREMENTS, _ALPHABET, _TABLE_WORDS, 1
        )
        self.num_escapes, self.order, self.escapes_before = cut(
            room(3 * num_blocks, torch.int32), *[num_blocks] * 3
        )
        tiles = cut(room(6 * num_tiles, torch.int32), *[num_tiles] * 6)
        self.tile_blocks, self.tile_values, self.tile_escapes, self.cursors, self.sizes, self.infos = tiles
        self.index, self.table_bytes, self.interval = cut(room(4, torch.int32), 1, 1, 2)
        self.plan, self.offsets = cut(room(3 + num_tiles, torch.int64), 3, num_tiles)
        self.entries = room(_ALPHABET, torch.uint64)
        self.states = room(num_tiles * LANES, torch.uint32)
        self.codes = room(num_blocks, torch.int16)
        self.symbols = room(num_blocks * rows * LANES, torch.uint8)
        self.escapes = room(num_blocks * BLOCK_VALUES, torch.int16)
        self.words = room(num_tiles * self.slot_words, torch.uint16)
