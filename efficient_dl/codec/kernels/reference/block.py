"""The block quantizer in torch: local scales, uniform steps, entropy-coded symbols (docs/format.md, codec 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference import tables, tiles
from efficient_dl.codec.kernels.reference.block_grid import BLOCK_VALUES, BlockGrid
from efficient_dl.codec.kernels.reference.block_scale import (
    NONFINITE_CODE,
    Quantized,
    choose_step,
    quantize,
    step_of,
)
from efficient_dl.codec.kernels.reference.symbols import MAX_TILE_BLOCKS, MIN_TILE_BLOCKS, Mode
from efficient_dl.codec.kernels.reference.tiles import LANES, STATE_BYTES
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, integers, pad4, to_bytes
from efficient_dl.codec.packet import HEADER_BYTES
from efficient_dl.codec.steps import FIRST_STEP_INDEX, LAST_STEP_INDEX, STEPS
from efficient_dl.errors import CorruptPacket

_HEAD_BYTES = 28
_MAX_ABSOLUTE_CODE = 1007
_BOUNDED_SHARE_Q16 = 64512  # 63/64 of what a capacity leaves: the sample's rate is not quite the tensor's
_MIN_BITS_Q16 = 6554
_CARRIED_ROWS = 2


@dataclass
class _Rows:
    """The coded blocks' rows of symbols in the order of the blocks, and which tile each belongs to."""

    symbols: Tensor  # int64 (rows, 128)
    tile: Tensor  # int64 (rows,)
    lanes: Tensor  # int64 (rows,): lanes that hold values
    escapes: list[Tensor]  # per tile, uint8: the escapes' bytes

    def drop(self, kept: int) -> None:
        """Takes away all rows and escapes behind the first `kept` tiles."""
        keep = self.tile < kept
        self.symbols, self.lanes, self.tile = self.symbols[keep], self.lanes[keep], self.tile[keep]
        self.escapes = [part[:0] if i >= kept else part for i, part in enumerate(self.escapes)]


def fixed_bytes(num_blocks: int, mode: Mode, bits_q16: int) -> int:
    """Bytes of a packet that do not depend on its values: the header, the codes, the directory, the largest table."""
    num_tiles = -(-num_blocks // mode.tile_blocks(bits_q16))
    return HEADER_BYTES + _HEAD_BYTES + -(-num_blocks // 4) * 4 + 8 * num_tiles + mode.table_room


def bounded_bits_q16(capacity: int, numel: int, num_blocks: int, mode: Mode, bits_q16: int) -> int:
    """The rate to look for so that a packet of `capacity` bytes, header included, most likely holds all tiles."""
    available = (capacity - fixed_bytes(num_blocks, mode, bits_q16)) * 8 * _BOUNDED_SHARE_Q16 // numel
    return min(bits_q16, max(_MIN_BITS_Q16, available + (8 * num_blocks << 16) // numel))


def encode(
    x: Tensor,
    grid: BlockGrid,
    mode: Mode,
    bits_q16: int,
    stats: PacketStats | None,
    capacity: int | None = None,
) -> Tensor:
    """Returns the body of a block-quantized packet, uint8. x: float32, 1-D.

    capacity: the most bytes that the packet may have, its header included, at least `fixed_bytes`; tiles that do not
    fit are dropped.
    """
    blocks = grid.gather(x)
    tile_blocks = mode.tile_blocks(bits_q16)
    target = bits_q16
    if capacity is not None:
        target = bounded_bits_q16(capacity, grid.numel, grid.num_blocks, mode, bits_q16)
    index = choose_step(blocks, grid, mode, target)
    quantized = quantize(blocks, grid, STEPS[index - FIRST_STEP_INDEX])
    base, codes = _relative_codes(quantized)
    coded = (codes > 0) & (codes < NONFINITE_CODE)
    rows = _rows(quantized.q, coded, grid, mode, tile_blocks)
    num_tiles = -(-grid.num_blocks // tile_blocks)
    counts = torch.bincount(rows.symbols.view(-1), minlength=mode.alphabet)
    frequency = tables.normalize(counts) if rows.symbols.numel() else None
    contents, is_coded = _tile_contents(rows, frequency, num_tiles)
    table = _serialized(frequency, is_coded, codes)
    num_dropped = 0
    if capacity is not None:
        prefix_bytes = HEADER_BYTES + _HEAD_BYTES + -(-grid.num_blocks // 4) * 4 + 8 * num_tiles
        kept = _tiles_within(contents, capacity - prefix_bytes - table.numel())
        tile = torch.arange(grid.num_blocks, device=x.device) // tile_blocks
        dropped = coded & (tile >= kept)
        num_dropped = int(dropped.sum())
        codes[dropped] = 0
        rows.drop(kept)
        contents = [content[:0] if i >= kept else content for i, content in enumerate(contents)]
        is_coded = [entropy_coded and i < kept for i, entropy_coded in enumerate(is_coded)]
        table = _serialized(frequency, is_coded, codes)
    escapes = [part.numel() // mode.escape_bytes for part in rows.escapes]
    directory: list[int] = []
    for content, entropy_coded, count in zip(contents, is_coded, escapes, strict=True):
        directory += [content.numel(), int(entropy_coded) | count << 1]
    head = [mode.code | (index & 0xFFFF) << 16, tile_blocks, grid.num_blocks, num_tiles]
    head += [base, table.numel(), num_dropped]
    prefix = to_bytes(torch.tensor(head, device=x.device), 4)
    scales = pad4(codes.to(torch.uint8))
    body = torch.cat(
        [prefix, scales, table, to_bytes(torch.tensor(directory, device=x.device), 4), *contents]
    )
    if stats is not None:
        values = quantized.q[(codes > 0) & (codes < NONFINITE_CODE)].clamp(-127, 127).view(-1)
        stats.order0_bits = order0_bits(torch.bincount(values + 127, minlength=255))
        stats.model_bits = _symbol_bits(rows, frequency, is_coded) + 8.0 * mode.escape_bytes * sum(escapes)
        stats.scale_bits = 8.0 * grid.num_blocks
        stats.header_bits = 8.0 * (prefix.numel() + table.numel() + 4 * len(directory))
        stats.escapes = sum(escapes)
        stats.empty_blocks = int((codes == 0).sum())
        stats.nonfinite_blocks = int((codes == NONFINITE_CODE).sum())
        stats.relative_step = float(STEPS[index - FIRST_STEP_INDEX])
        stats.dropped_blocks = num_dropped
    return body


def decode(body: Tensor, grid: BlockGrid) -> Tensor:
    """Returns the decoded values, float32 1-D; raises `CorruptPacket`."""
    reader = Reader(body)
    head, tile_blocks, num_blocks, num_tiles, base, table_bytes, num_dropped = reader.integers(7, 4)
    mode = Mode.from_code(head & 0xFFFF)
    step_index = (head >> 16) - (0x10000 if head >> 31 else 0)
    valid = (
        MIN_TILE_BLOCKS <= tile_blocks <= MAX_TILE_BLOCKS
        and tile_blocks & (tile_blocks - 1) == 0
        and num_blocks == grid.num_blocks
        and num_tiles == -(-num_blocks // tile_blocks)
        and 3 <= base < _MAX_ABSOLUTE_CODE
        and FIRST_STEP_INDEX <= step_index <= LAST_STEP_INDEX
        and num_dropped <= num_blocks
    )
    if not valid:
        raise CorruptPacket(
            "a block-quantized packet does not fit its tensor",
            expected=f"{grid.num_blocks} blocks, a power of two from 64 to 65536 a tile",
            found=f"{num_blocks} blocks, {tile_blocks} a tile, {num_tiles} tiles, base {base}, {num_dropped} dropped",
        )
    codes = reader.take(num_blocks).to(torch.int64)
    reader.align4()
    frequency = tables.parse(reader.take(table_bytes), mode.alphabet) if table_bytes else None
    directory = reader.integers(2 * num_tiles, 4)
    is_coded = (codes > 0) & (codes < NONFINITE_CODE)
    if bool((codes[is_coded] + base > _MAX_ABSOLUTE_CODE).any()):
        raise CorruptPacket("a block's scale is out of range")
    coded_blocks = is_coded.nonzero()[:, 0]
    q = torch.zeros((num_blocks, BLOCK_VALUES), dtype=torch.int64, device=body.device)
    any_coded = False
    for i in range(num_tiles):
        tile_bytes, info = directory[2 * i : 2 * i + 2]
        here = coded_blocks[(coded_blocks // tile_blocks) == i]
        content = Reader(reader.take(tile_bytes))
        lanes = mode.row_lanes(grid.lengths[here])
        if info & 1:
            any_coded = True
            symbols = _decode_coded(content, frequency, lanes.numel(), info >> 1, mode)
        else:
            symbols = _decode_stored(content, lanes)
        if bool((symbols >= mode.alphabet).any()):
            raise CorruptPacket("a symbol outside of the alphabet", where=f"tile {i}")
        content.align4()
        escape_bytes = content.take((info >> 1) * mode.escape_bytes)
        content.align4()
        content.end()
        q[here] = mode.values(symbols, escape_bytes)
    reader.end()
    if frequency is not None and not any_coded:
        raise CorruptPacket("a frequency table that no tile uses")
    if bool((q * ~grid.mask).any()):
        raise CorruptPacket("a value behind the end of a short block")
    step = step_of(torch.where(is_coded, codes + base, 4))
    values = q.to(torch.float32) * step[:, None]
    values[codes == NONFINITE_CODE] = torch.nan
    return grid.scatter(values)


def _relative_codes(quantized: Quantized) -> tuple[int, Tensor]:
    live = ~quantized.nonfinite & ~quantized.empty
    base = max(3, int(quantized.code[live].max()) - 254) if bool(live.any()) else 3
    live &= quantized.code > base
    codes = torch.where(live, quantized.code - base, 0)
    return base, torch.where(quantized.nonfinite, NONFINITE_CODE, codes)


def _serialized(frequency: Tensor | None, is_coded: list[bool], codes: Tensor) -> Tensor:
    if frequency is None or not any(is_coded):
        return codes[:0].to(torch.uint8)
    return tables.serialize(frequency)


def _tiles_within(contents: list[Tensor], limit: int) -> int:
    """How many tiles from the first on have at most `limit` bytes together."""
    total = 0
    for kept, content in enumerate(contents):
        total += content.numel()
        if total > limit:
            return kept
    return len(contents)


def _rows(q: Tensor, coded: Tensor, grid: BlockGrid, mode: Mode, tile_blocks: int) -> _Rows:
    block = coded.nonzero()[:, 0]
    symbols, escaped = mode.symbols(q[block])
    tile = (block // tile_blocks).repeat_interleave(mode.rows_per_block)
    num_tiles = -(-grid.num_blocks // tile_blocks)
    escapes = [mode.escape_stream(q[block], escaped & (tile == i)[:, None]) for i in range(num_tiles)]
    return _Rows(symbols, tile, mode.row_lanes(grid.lengths[block]), escapes)


def _tile_contents(rows: _Rows, frequency: Tensor | None, num_tiles: int) -> tuple[list[Tensor], list[bool]]:
    device = rows.symbols.device
    counts = torch.bincount(rows.tile, minlength=num_tiles)
    per_tile = torch.split(rows.symbols, integers(counts))
    lanes = torch.split(rows.lanes, integers(counts))
    lane = torch.arange(LANES, device=device)
    contents = [
        torch.cat([pad4(s[lane < n[:, None]].to(torch.uint8)), pad4(e)])
        for s, n, e in zip(per_tile, lanes, rows.escapes, strict=True)
    ]
    is_coded = [False] * num_tiles
    candidates = [i for i in range(num_tiles) if int(counts[i]) > _CARRIED_ROWS]
    if frequency is None or not candidates:
        return contents, is_coded
    num_rows = counts[candidates] - _CARRIED_ROWS
    batch = torch.zeros((len(candidates), int(num_rows.max()), LANES), dtype=torch.int64, device=device)
    carry = torch.zeros((len(candidates), LANES), dtype=torch.int64, device=device)
    for k, i in enumerate(candidates):
        batch[k, : int(num_rows[k])] = per_tile[i][:-_CARRIED_ROWS]
        carry[k] = per_tile[i][-2] | per_tile[i][-1] << 8
    states, words = tiles.encode(batch, num_rows, frequency, carry)
    for k, i in enumerate(candidates):
        stream = pad4(torch.cat([to_bytes(states[k], 4), to_bytes(words[k], 2)]))
        content = torch.cat([stream, pad4(rows.escapes[i])])
        if content.numel() < contents[i].numel():
            contents[i], is_coded[i] = content, True
    return contents, is_coded


def _symbol_bits(rows: _Rows, frequency: Tensor | None, is_coded: list[bool]) -> float:
    coded = torch.tensor(is_coded, dtype=torch.bool, device=rows.tile.device)[rows.tile]
    stored = 8.0 * int(rows.lanes[~coded].sum())
    if frequency is None:
        return stored
    counts = torch.bincount(rows.symbols[coded].view(-1), minlength=frequency.numel())
    return stored + model_bits(counts, frequency)


def _decode_coded(content: Reader, frequency: Tensor | None, rows: int, escapes: int, mode: Mode) -> Tensor:
    stream_bytes = content.remaining - -(-escapes * mode.escape_bytes // 4) * 4 - STATE_BYTES
    if frequency is None or rows <= _CARRIED_ROWS:
        raise CorruptPacket("a coded tile without a table, or with too few rows")
    states = from_bytes(content.take(STATE_BYTES), 4)
    if stream_bytes % 2:
        raise CorruptPacket("a tile has half a word")
    stream = from_bytes(content.take(stream_bytes), 2)
    num_rows = torch.tensor([rows - _CARRIED_ROWS], device=states.device)
    symbols, carry = tiles.decode(states[None], [stream], num_rows, frequency)
    return torch.cat([symbols[0], carry & 0xFF, carry >> 8])


def _decode_stored(content: Reader, lanes: Tensor) -> Tensor:
    symbols = torch.full((lanes.numel(), LANES), -1, dtype=torch.int64, device=lanes.device)
    holds_value = torch.arange(LANES, device=lanes.device) < lanes[:, None]
    symbols[holds_value] = content.take(int(lanes.sum())).to(torch.int64)
    return symbols
