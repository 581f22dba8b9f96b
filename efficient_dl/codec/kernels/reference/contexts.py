"""Integers with contexts in torch: the class of a block chooses the table of its symbols (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference import context_classes, tables, tiles
from efficient_dl.codec.kernels.reference.block_grid import BLOCK_VALUES, BlockGrid
from efficient_dl.codec.kernels.reference.block_scale import log2_q16
from efficient_dl.codec.kernels.reference.context_classes import FIRST_WIDE_CLASS, NONFINITE_CLASS
from efficient_dl.codec.kernels.reference.symbols import PAIRS, SINGLES
from efficient_dl.codec.kernels.reference.tiles import LANES, STATE_BYTES
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, integers, pad4, to_bytes
from efficient_dl.errors import CorruptPacket

_MAX_TABLES_BYTES: Final = 11 * 200 + 4 * 416
_NO_TABLE: Final = 255
_ALPHABET: Final = SINGLES.alphabet  # of the widest table; narrower ones are padded with zeros
_PAIR_BASE: Final = 2 * PAIRS.radius + 1
_STATE_SHARE: Final = 384000  # bits a tile, so that the lanes' states cost about 1 %
_MIN_TILE_BLOCKS, _MAX_CHOSEN_TILE_BLOCKS = 256, 1 << 16
_MIN_SENT_TILE_BLOCKS, _MAX_SENT_TILE_BLOCKS = 64, 1 << 20
_ONE_BIT: Final = 65536  # costs are in units of 2^-16 bit
_MAX_COUNT: Final = 2**31


@dataclass
class _Rows:
    """The rows of symbols in the order of the blocks.

    symbols: int64 (rows, 128). block, context, lanes: int64 (rows,), the row's block, its class, and its lanes that
    hold values. escaped: bool (rows, 128). values: int64 (rows, 128, 2), q of each lane's one or two values.
    """

    symbols: Tensor
    block: Tensor
    context: Tensor
    lanes: Tensor
    escaped: Tensor
    values: Tensor

    def escaped_values(self) -> Tensor:
        """bool (rows, 128, 2): the values that are sent apart; only pairs have a second one."""
        second = self.escaped & (self.context < FIRST_WIDE_CLASS)[:, None]
        return torch.stack([self.escaped, second], 2)


def encode(
    q: Tensor, nonfinite: Tensor, grid: BlockGrid, value_bytes: int, stats: PacketStats | None
) -> Tensor:
    """Codes integers; returns everything behind a packet's first parameter, uint8.

    q: int64 (num_blocks, 256), zeros behind the end of short blocks. nonfinite: bool (num_blocks,).
    value_bytes: of an escaped value.
    """
    device = q.device
    classes = context_classes.classes_of(q, nonfinite)
    rows = _rows(q, classes, grid.lengths)
    counts = _counts_by_class(rows)
    table_of_class, groups, group_cost = _grouped(counts)
    frequency = torch.zeros((max(len(groups), 1), _ALPHABET), dtype=torch.int64, device=device)
    serialized: list[Tensor] = []
    for i, (alphabet, group) in enumerate(groups):
        frequency[i, :alphabet] = tables.normalize(group[:alphabet])
        serialized.append(tables.serialize(frequency[i, :alphabet]))
    tile_blocks = _tile_blocks(grid.num_blocks, group_cost)
    num_tiles = -(-grid.num_blocks // tile_blocks)
    map_bytes = torch.tensor(table_of_class, device=device)
    row_table = map_bytes[rows.context]
    contents, infos = _tile_contents(rows, row_table, frequency, tile_blocks, num_tiles, value_bytes)
    class_stream, class_bits, class_header_bytes = context_classes.encode(classes)
    table_data = torch.cat([class_stream[:0], *serialized])
    directory = [n for content, info in zip(contents, infos, strict=True) for n in (content.numel(), info)]
    head = [grid.num_blocks, tile_blocks, num_tiles, class_stream.numel(), table_data.numel()]
    if stats is not None:
        escapes = int(rows.escaped.sum())
        sent_apart = rows.values[rows.escaped_values()]
        escape_bits = 8.0 * value_bytes * sent_apart.numel()
        stored_rows = (torch.tensor(infos, device=device)[rows.block // tile_blocks] & 1) == 0
        coded_counts = torch.zeros_like(frequency).view(-1)
        symbol = rows.symbols + _ALPHABET * row_table[:, None]
        coded_counts += torch.bincount(symbol[~stored_rows].view(-1), minlength=coded_counts.numel())
        stats.model_bits = (
            model_bits(coded_counts, frequency.view(-1))
            + 8.0 * int(rows.lanes[stored_rows].sum())
            + escape_bits
        )
        finite = q[grid.mask & ~nonfinite[:, None]].clamp(-SINGLES.radius, SINGLES.radius)
        stats.order0_bits = order0_bits(torch.bincount(finite + SINGLES.radius))
        stats.scale_bits = class_bits
        stats.header_bits = 8.0 * (
            4 * len(head) + class_header_bytes + 16 + table_data.numel() + 8 * num_tiles
        )
        stats.escapes = escapes
        stats.largest_escape = int(sent_apart.abs().amax()) if sent_apart.numel() else 0
        stats.empty_blocks = int((classes == 0).sum())
        stats.nonfinite_blocks = int(nonfinite.sum())
    return torch.cat(
        [
            to_bytes(torch.tensor(head, device=device), 4),
            class_stream,
            map_bytes.to(torch.uint8),
            table_data,
            to_bytes(torch.tensor(directory, dtype=torch.int64, device=device), 4),
            *contents,
        ]
    )


def decode(reader: Reader, grid: BlockGrid, value_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The inverse of `encode`: q, int64 (num_blocks, 256), and the classes, int64 (num_blocks,)."""
    num_blocks, tile_blocks, num_tiles, class_bytes, tables_bytes = reader.integers(5, 4)
    valid = (
        num_blocks == grid.num_blocks
        and _MIN_SENT_TILE_BLOCKS <= tile_blocks <= _MAX_SENT_TILE_BLOCKS
        and tile_blocks & (tile_blocks - 1) == 0
        and num_tiles == -(-num_blocks // tile_blocks)
    )
    if not valid:
        raise CorruptPacket(
            "a packet of integers does not fit its tensor",
            expected=f"{grid.num_blocks} blocks, a power of two from 64 to 2^20 a tile",
            found=f"{num_blocks} blocks, {tile_blocks} a tile, {num_tiles} tiles",
        )
    classes = context_classes.decode(Reader(reader.take(class_bytes)), num_blocks)
    map_bytes = reader.take(16).to(torch.int64)
    frequency = _read_tables(Reader(reader.take(tables_bytes)), integers(map_bytes), classes)
    directory = reader.integers(2 * num_tiles, 4)

    block, second = _rows_of_blocks(classes)
    context = classes[block]
    lanes = _lanes(grid.lengths[block], second)
    rows_in_tile = integers(torch.bincount(block // tile_blocks, minlength=num_tiles))
    symbols: list[Tensor] = [torch.empty((0, LANES), dtype=torch.int64, device=device)]
    sent: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=device)]
    row = 0
    for i, count in enumerate(rows_in_tile):
        tile_bytes, info = directory[2 * i : 2 * i + 2]
        content = Reader(reader.take(tile_bytes))
        if count == 0:
            if tile_bytes or info:
                raise CorruptPacket("a tile without rows has content", where=f"tile {i}")
            continue
        here = slice(row, row + count)
        row += count
        escape_bytes = (info >> 1) * value_bytes
        if info & 1:
            table = map_bytes[context[here]]
            part = _decode_coded(content, escape_bytes, count, frequency, table)
        else:
            part = _decode_stored(content, lanes[here], context[here])
        content.align4()
        wide = context[here] >= FIRST_WIDE_CLASS
        escaped = part == torch.where(wide, SINGLES.escape, PAIRS.escape)[:, None]
        if int(escaped[wide].sum()) + 2 * int(escaped[~wide].sum()) != info >> 1:
            raise CorruptPacket("a tile's escapes do not match its directory entry", where=f"tile {i}")
        sent.append(from_bytes(content.take(escape_bytes), value_bytes, signed=True))
        content.align4()
        content.end()
        symbols.append(part)
    q = _values(torch.cat(symbols), torch.cat(sent), block, second, context, num_blocks)
    if bool((q * ~grid.mask).any()):
        raise CorruptPacket("a value behind the end of a short block")
    return q, classes


def cost_q16(q: Tensor, lengths: Tensor, value_bytes: int) -> int:
    """What finite blocks cost with a table for each class, in units of 2^-16 bit. q: int64 (num_blocks, 256)."""
    classes = context_classes.classes_of(q, torch.zeros_like(lengths, dtype=torch.bool))
    rows = _rows(q, classes, lengths)
    cost = _entropy_q16(torch.bincount(classes)) + _entropy_q16(_counts_by_class(rows))
    return cost + int(rows.escaped_values().sum()) * 8 * value_bytes * _ONE_BIT


def max_bytes(numel: int, num_segments: int, value_bytes: int) -> int:
    """The largest result of `encode`: all tiles stored, all values escaped."""
    num_blocks = min(numel, numel // BLOCK_VALUES + num_segments)
    num_tiles = num_blocks // _MIN_TILE_BLOCKS + 1
    # At most 31 pairs of a block are escaped: each adds 6 to a sum below 191. Where that is more than its values
    # are worth as bytes, the block is short, and only a segment's last is.
    pairs = min(31 * 2 * num_segments, numel)
    content = numel * (1 + value_bytes) + pairs * value_bytes + num_tiles * (8 + 8)
    return 20 + 4 + num_blocks + 3 + 16 + _MAX_TABLES_BYTES + content


def sample_of(num_blocks: int, device: torch.device) -> Tensor:
    """The indices of the blocks that choices are measured on."""
    return torch.arange(0, num_blocks, max(1, num_blocks // 256), device=device)


def _rows_of_blocks(classes: Tensor) -> tuple[Tensor, Tensor]:
    coded = ((classes > 0) & (classes < NONFINITE_CLASS)).nonzero()[:, 0]
    wide = classes[coded] >= FIRST_WIDE_CLASS
    block = coded.repeat_interleave(1 + wide.to(torch.int64))
    second = torch.zeros_like(block, dtype=torch.bool)
    second[1:] = block[1:] == block[:-1]
    return block, second


def _lanes(lengths: Tensor, second: Tensor) -> Tensor:
    return (lengths - LANES * second.to(torch.int64)).clamp(0, LANES)


def _rows(q: Tensor, classes: Tensor, lengths: Tensor) -> _Rows:
    block, second = _rows_of_blocks(classes)
    context = classes[block]
    wide = (context >= FIRST_WIDE_CLASS)[:, None]
    other = q[block, LANES:]
    first = torch.where(second[:, None], other, q[block, :LANES])
    pair = (first + PAIRS.radius) * _PAIR_BASE + other + PAIRS.radius
    pair_escaped = (first.abs() > PAIRS.radius) | (other.abs() > PAIRS.radius)
    escaped = torch.where(wide, first.abs() > SINGLES.radius, pair_escaped)
    symbols = torch.where(wide, first + SINGLES.radius, pair)
    symbols = torch.where(escaped, torch.where(wide, SINGLES.escape, PAIRS.escape), symbols)
    lanes = _lanes(lengths[block], second)
    return _Rows(symbols, block, context, lanes, escaped, torch.stack([first, other], 2))


def _counts_by_class(rows: _Rows) -> Tensor:
    symbol = rows.symbols + _ALPHABET * rows.context[:, None]
    return torch.bincount(symbol.view(-1), minlength=16 * _ALPHABET).view(16, _ALPHABET)


def _entropy_q16(counts: Tensor) -> int:
    """What the symbols with these counts cost, or those of several tables, one a row; int64 (..., alphabet)."""
    totals = counts.sum(-1, keepdim=True)
    logarithms = log2_q16(torch.cat([totals, counts], -1).clamp(min=1))  # what does not occur costs nothing
    return int((counts * (logarithms[..., :1] - logarithms[..., 1:])).sum())


def _grouped(counts: Tensor) -> tuple[list[int], list[tuple[int, Tensor]], int]:
    """The table of each class, each table's alphabet and counts, and what all symbols cost."""
    table_of_class = [_NO_TABLE] * 16
    scaled = counts
    while int(scaled.sum()) >= _MAX_COUNT:
        scaled = (scaled + 1) >> 1
    groups: list[tuple[int, Tensor]] = []
    total = cost = 0
    current = scaled[0]
    for c in range(1, 16):
        if not bool(counts[c].any()):
            continue
        alphabet = SINGLES.alphabet if c >= FIRST_WIDE_CLASS else PAIRS.alphabet
        own = _entropy_q16(scaled[c])
        if groups and groups[-1][0] == alphabet:
            table_bits = 8 * tables.serialized_bytes(int((counts[c] > 0).sum()), alphabet)
            joined = _entropy_q16(current + scaled[c])
            if joined <= cost + own + table_bits * _ONE_BIT:
                groups[-1] = (alphabet, groups[-1][1] + counts[c])
                table_of_class[c] = len(groups) - 1
                total += joined - cost
                current, cost = current + scaled[c], joined
                continue
        groups.append((alphabet, counts[c]))
        table_of_class[c] = len(groups) - 1
        total += own
        current, cost = scaled[c], own
    return table_of_class, groups, total


def _tile_blocks(num_blocks: int, cost: int) -> int:
    wanted = _STATE_SHARE * num_blocks * _ONE_BIT // max(1, cost)
    blocks = _MIN_TILE_BLOCKS
    while blocks < wanted and blocks < _MAX_CHOSEN_TILE_BLOCKS:
        blocks *= 2
    return blocks


def _tile_contents(
    rows: _Rows, row_table: Tensor, frequency: Tensor, tile_blocks: int, num_tiles: int, value_bytes: int
) -> tuple[list[Tensor], list[int]]:
    counts = torch.bincount(rows.block // tile_blocks, minlength=num_tiles)
    sizes = integers(counts)
    lane = torch.arange(LANES, device=rows.symbols.device)
    contents: list[Tensor] = []
    infos: list[int] = []
    escaped = rows.escaped_values()
    row = 0
    for size in sizes:
        here = slice(row, row + size)
        row += size
        symbols, lanes = rows.symbols[here], rows.lanes[here]
        escapes = rows.values[here][escaped[here]]
        content = pad4(symbols[lane < lanes[:, None]].to(torch.uint8))
        coded = False
        if size:
            states, words = tiles.encode(
                symbols[None], counts.new_tensor([size]), frequency, torch.zeros_like(symbols[:1]),
                row_table[None, here],
            )  # fmt: skip
            stream = pad4(torch.cat([to_bytes(states[0], 4), to_bytes(words[0], 2)]))
            coded = stream.numel() < content.numel()
            content = stream if coded else content
        contents.append(torch.cat([content, pad4(to_bytes(escapes, value_bytes))]))
        infos.append(int(coded) | escapes.numel() << 1)
    return contents, infos


def _read_tables(reader: Reader, table_of_class: list[int], classes: Tensor) -> Tensor:
    """Frequencies, int64 (tables, 256); raises unless the map is one that the document allows."""
    has_blocks = torch.bincount(classes, minlength=NONFINITE_CLASS + 1) > 0
    frequencies: list[Tensor] = []
    alphabets: list[int] = []
    for c, index in enumerate(table_of_class):
        if index == _NO_TABLE:
            if c > 0 and bool(has_blocks[c]):
                raise CorruptPacket("a class has blocks, but no table", where=f"class {c}")
            continue
        alphabet = SINGLES.alphabet if c >= FIRST_WIDE_CLASS else PAIRS.alphabet
        if c == 0 or not bool(has_blocks[c]):
            raise CorruptPacket("a class has a table, but no blocks", where=f"class {c}")
        if index == len(frequencies):
            frequency = torch.zeros(_ALPHABET, dtype=torch.int64, device=classes.device)
            frequency[:alphabet] = tables.parse_next(reader, alphabet)
            frequencies.append(frequency)
            alphabets.append(alphabet)
        elif index != len(frequencies) - 1 or alphabets[-1] != alphabet:
            raise CorruptPacket("the tables are not numbered in the order of their classes")
    reader.end()
    return torch.stack(frequencies) if frequencies else classes.new_zeros((1, _ALPHABET))


def _decode_coded(content: Reader, escape_bytes: int, rows: int, frequency: Tensor, table: Tensor) -> Tensor:
    stream_bytes = content.remaining - -(-escape_bytes // 4) * 4 - STATE_BYTES
    states = from_bytes(content.take(STATE_BYTES), 4)
    if stream_bytes % 2:
        raise CorruptPacket("a tile has half a word")
    stream = from_bytes(content.take(stream_bytes), 2)
    num_rows = torch.tensor([rows], device=states.device)
    symbols, carry = tiles.decode(states[None], [stream], num_rows, frequency, table[None])
    if bool(carry.any()):
        raise CorruptPacket("a lane's state does not return to its beginning")
    return symbols[0]


def _decode_stored(content: Reader, lanes: Tensor, context: Tensor) -> Tensor:
    wide = (context >= FIRST_WIDE_CLASS)[:, None]
    zero = torch.where(wide, SINGLES.radius, PAIRS.radius * (_PAIR_BASE + 1))
    symbols = zero.repeat(1, LANES)
    holds_value = torch.arange(LANES, device=lanes.device) < lanes[:, None]
    symbols[holds_value] = content.take(int(lanes.sum())).to(torch.int64)
    if bool((symbols >= torch.where(wide, SINGLES.alphabet, PAIRS.alphabet)).any()):
        raise CorruptPacket("a symbol outside of the alphabet")
    return symbols


def _values(
    symbols: Tensor, sent: Tensor, block: Tensor, second: Tensor, context: Tensor, num_blocks: int
) -> Tensor:
    wide = context >= FIRST_WIDE_CLASS
    pair = torch.stack([symbols // _PAIR_BASE, symbols % _PAIR_BASE], 2) - PAIRS.radius
    single = torch.stack([symbols, symbols], 2) - SINGLES.radius
    values = torch.where(wide[:, None, None], single, pair)
    escaped = symbols == torch.where(wide, SINGLES.escape, PAIRS.escape)[:, None]
    values[torch.stack([escaped, escaped & ~wide[:, None]], 2)] = sent
    q = torch.zeros((num_blocks, 2 * LANES), dtype=torch.int64, device=symbols.device)
    q[block[~second], :LANES] = values[~second, :, 0]
    q[block[~wide], LANES:] = values[~wide, :, 1]
    q[block[second], LANES:] = values[second, :, 0]
    return q
