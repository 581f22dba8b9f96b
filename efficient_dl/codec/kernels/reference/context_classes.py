"""The classes of blocks, by the sum of their magnitudes, and the stream that they travel in (docs/format.md)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from efficient_dl.codec.entropy import model_bits
from efficient_dl.codec.kernels.reference import tables, tiles
from efficient_dl.codec.kernels.reference.tiles import LANES, STATE_BYTES
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, pad4, to_bytes
from efficient_dl.errors import CorruptPacket

THRESHOLDS: Final = (1, 2, 3, 5, 8, 12, 19, 30, 47, 75, 119, 191, 304, 486, 777)
FIRST_WIDE_CLASS: Final = 12  # from here on, two rows of byte symbols
NONFINITE_CLASS: Final = 16
_ALPHABET: Final = 17
_MAX_MAGNITUDE: Final = 255  # of a value in the sum, so that one outlier does not hide the others
_TILE_ROWS: Final = 256


def classes_of(q: Tensor, nonfinite: Tensor) -> Tensor:
    """The class of each block. q: int64 (num_blocks, 256); nonfinite: bool (num_blocks,). Returns int64."""
    total = q.abs().clamp(max=_MAX_MAGNITUDE).sum(1)
    classes = torch.bucketize(total, torch.tensor(THRESHOLDS, device=q.device), right=True)
    return torch.where(nonfinite, NONFINITE_CLASS, classes)


def encode(classes: Tensor) -> tuple[Tensor, float, int]:
    """The class stream, uint8; the ideal bits of the classes; the bytes of the stream that are no classes."""
    stored = pad4(classes.to(torch.uint8))
    symbols = _rows(classes)
    counts = torch.bincount(symbols.view(-1), minlength=_ALPHABET)
    frequency = tables.normalize(counts)
    table = tables.serialize(frequency)
    parts = [to_bytes(counts.new_tensor([table.numel()]), 4), table]
    for tile in torch.split(symbols, _TILE_ROWS):
        num_rows = counts.new_tensor([tile.shape[0]])
        states, words = tiles.encode(tile[None], num_rows, frequency, torch.zeros_like(tile[:1]))
        stream = pad4(torch.cat([to_bytes(states[0], 4), to_bytes(words[0], 2)]))
        parts += [to_bytes(counts.new_tensor([stream.numel()]), 4), stream]
    coded = torch.cat(parts)
    if stored.numel() + 4 <= coded.numel():
        return torch.cat([stored.new_zeros(4), stored]), 8.0 * classes.numel(), 4
    header_bytes = 4 + table.numel() + 4 * -(-symbols.shape[0] // _TILE_ROWS)
    return coded, model_bits(counts, frequency), header_bytes


def decode(reader: Reader, num_blocks: int) -> Tensor:
    """The inverse of `encode`: the class of each block, int64."""
    (table_bytes,) = reader.integers(1, 4)
    if table_bytes == 0:
        classes = reader.take(num_blocks).to(torch.int64)
        reader.align4()
        reader.end()
        if bool((classes >= _ALPHABET).any()):
            raise CorruptPacket("a block's class is out of range")
        return classes
    frequency = tables.parse(reader.take(table_bytes), _ALPHABET)
    num_rows = -(-num_blocks // LANES)
    rows: list[Tensor] = []
    for first in range(0, num_rows, _TILE_ROWS):
        count = min(_TILE_ROWS, num_rows - first)
        (stream_bytes,) = reader.integers(1, 4)
        if stream_bytes % 4:
            raise CorruptPacket("a tile of classes has half a word")
        states = from_bytes(reader.take(STATE_BYTES), 4)
        words = from_bytes(reader.take(stream_bytes - STATE_BYTES), 2)
        symbols, carry = tiles.decode(
            states[None], [words], torch.tensor([count], device=states.device), frequency
        )
        if bool(carry.any()):
            raise CorruptPacket("a lane's state does not return to its beginning")
        rows.append(symbols[0])
    reader.end()
    classes = torch.cat(rows).view(-1)
    if bool(classes[num_blocks:].any()):
        raise CorruptPacket("a class behind the last block")
    return classes[:num_blocks]


def _rows(classes: Tensor) -> Tensor:
    rows = classes.new_zeros(-(-classes.numel() // LANES) * LANES)
    rows[: classes.numel()] = classes
    return rows.view(-1, LANES)
