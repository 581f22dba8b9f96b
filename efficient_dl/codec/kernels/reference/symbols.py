"""Quantized values to one-byte symbols and back: pairs at low rates, single values above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference.tiles import LANES
from efficient_dl.codec.kernels.reference.wire import from_bytes, to_bytes
from efficient_dl.errors import CorruptPacket

MIN_TILE_BLOCKS: Final = 64
MAX_TILE_BLOCKS: Final = 65536
_STATE_SHARE = 1 << 26  # blocks a tile times bits_q16: the states cost about 1 %


@dataclass(frozen=True)
class Mode:
    """How a block of 256 quantized values becomes rows of 128 symbols.

    radius: the largest |q| that has a symbol; larger values are sent apart, as 16-bit escapes.
    table_room: bytes that bounded packets set aside for the table.
    """

    code: int
    radius: int
    alphabet: int
    rows_per_block: int
    fewest_tile_blocks: int
    escape_bytes: int
    table_room: int

    @property
    def escape(self) -> int:
        """The symbol that says: the value is among the escapes."""
        return self.alphabet - 1

    def tile_blocks(self, bits_q16: int) -> int:
        """Blocks that an encoder puts into a tile: at low rates more, so that the lanes' states stay cheap."""
        blocks = self.fewest_tile_blocks
        while self.rows_per_block == 1 and blocks * bits_q16 < _STATE_SHARE:
            blocks *= 2
        return blocks

    @staticmethod
    def from_code(code: int) -> Mode:
        """The mode that a packet names."""
        if code not in (PAIRS.code, SINGLES.code):
            raise CorruptPacket("unknown symbol mode", expected="0 or 1", found=str(code))
        return PAIRS if code == PAIRS.code else SINGLES

    def symbols(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q: int64 (blocks, 256). Returns symbols, int64 (rows, 128), and which of them are escapes."""
        fits = q.abs() <= self.radius
        if self.rows_per_block == 2:
            symbol, escaped = (q + self.radius).view(-1, LANES), ~fits.view(-1, LANES)
        else:
            first, second = q[:, :LANES], q[:, LANES:]
            symbol = (first + self.radius) * (2 * self.radius + 1) + second + self.radius
            escaped = ~(fits[:, :LANES] & fits[:, LANES:])
        return torch.where(escaped, self.escape, symbol), escaped

    def escape_stream(self, q: Tensor, escaped: Tensor) -> Tensor:
        """The bytes of the escaped values, in order of (row, lane)."""
        values = q.view(-1, LANES)[escaped] if self.rows_per_block == 2 else self._pairs(q)[escaped].view(-1)
        return to_bytes(values, 2)

    def values(self, symbols: Tensor, escapes: Tensor) -> Tensor:
        """The inverse of `symbols` and `escape_stream`: q, int64 (blocks, 256). A symbol of -1 stands for zeros."""
        escaped = symbols == self.escape
        if int(escaped.sum()) * self.escape_bytes != escapes.numel():
            raise CorruptPacket("a tile's escapes do not match its directory entry")
        sent = from_bytes(escapes, 2, signed=True)
        if self.rows_per_block == 2:
            q = torch.where(symbols < 0, 0, symbols - self.radius)
            q[escaped] = sent
            return q.view(-1, 2 * LANES)
        base = 2 * self.radius + 1
        pairs = torch.stack([symbols // base, symbols % base], 2) - self.radius
        pairs[symbols < 0] = 0
        pairs[escaped] = sent.view(-1, 2)
        return pairs.transpose(1, 2).reshape(-1, 2 * LANES)

    def row_lanes(self, lengths: Tensor) -> Tensor:
        """Lanes that hold values, for each row of blocks with these lengths. int64 (rows,)."""
        if self.rows_per_block == 1:
            return lengths.clamp(max=LANES)
        return torch.stack([lengths.clamp(max=LANES), (lengths - LANES).clamp(min=0)], 1).view(-1)

    @staticmethod
    def _pairs(q: Tensor) -> Tensor:
        return torch.stack([q[:, :LANES], q[:, LANES:]], 2)


PAIRS: Final = Mode(
    code=0,
    radius=5,
    alphabet=122,
    rows_per_block=1,
    fewest_tile_blocks=512,
    escape_bytes=4,
    table_room=216,
)
SINGLES: Final = Mode(
    code=1,
    radius=127,
    alphabet=256,
    rows_per_block=2,
    fewest_tile_blocks=256,
    escape_bytes=2,
    table_room=416,
)
MAX_PAIR_BITS: Final = 2.5
