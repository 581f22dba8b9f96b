"""The exact codec in torch: distances of exponents entropy-coded, the other bits raw (docs/format.md, codec 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference import block_codes, exponents, tables, tiles
from efficient_dl.codec.kernels.reference.exponents import BLOCK_VALUES, ESCAPE, FLOAT8_DTYPES, Fields
from efficient_dl.codec.kernels.reference.tiles import LANES, STATE_BYTES
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, pad4, to_bytes
from efficient_dl.codec.packet import byte_view
from efficient_dl.errors import CorruptPacket

TILE_BLOCKS = 128
TILE_VALUES = TILE_BLOCKS * BLOCK_VALUES
ALPHABET = 256

_CODED = 1
_MODE_SHIFTS = (8, 10)  # of planes 1 and 2 in a tile's info
_ABSENT, _WHOLE, _BY_BLOCK = 0, 1, 2
_ESCAPES_SHIFT = 12
_CARRIED_ROWS = 2  # whose raw bytes travel in the lanes' initial states


@dataclass
class _Tile:
    """The blocks of a tile that have rows, and what is sent for them."""

    stored: Tensor  # uint8, padded
    codes: Tensor  # uint8: their section of a coded tile
    symbols: Tensor  # int64 (rows, 128)
    raw: Tensor  # uint8: planes and escapes behind the words
    carry: Tensor  # int64 (128,)
    coded_rows: int
    raw_bits: int  # of values: planes, carried bits and escapes
    info: int  # if it is coded
    num_escapes: int

    @property
    def rows(self) -> int:
        return self.symbols.shape[0]


def max_bytes(numel: int, dtype: torch.dtype) -> int:
    """The largest body: all tiles stored."""
    return 8 + 12 * -(-numel // TILE_VALUES) + _padded(numel * dtype.itemsize)


def encode(x: Tensor, stats: PacketStats | None) -> Tensor:
    """Returns the body of a lossless packet, uint8. x: 1-D, not empty, of any dtype that packets have."""
    fields = exponents.split(x)
    cut = [_cut_tile(x, fields, first) for first in range(0, fields.codes.numel(), TILE_BLOCKS)]
    symbols = fields.symbols[fields.codes > 0]
    counts = torch.bincount(symbols.view(-1), minlength=ALPHABET)
    candidates = [tile for tile in cut if tile.coded_rows > 0]
    frequency, table = None, x.new_zeros(0, dtype=torch.uint8)
    coded: dict[int, tuple[Tensor, int]] = {}
    if candidates:
        frequency = tables.normalize(counts)
        table = tables.serialize(frequency)
        saved = 0
        for tile, (content, num_words) in zip(candidates, _code_tiles(candidates, frequency), strict=True):
            if content.numel() < tile.stored.numel():
                coded[id(tile)] = content, num_words
                saved += tile.stored.numel() - content.numel()
        if saved <= table.numel():
            coded, table = {}, table[:0]
    directory: list[int] = []
    parts: list[Tensor] = []
    for tile in cut:
        content, num_words = coded.get(id(tile), (tile.stored, 0))
        directory += [content.numel(), num_words, tile.info if id(tile) in coded else 0]
        parts.append(content)
    prefix = to_bytes(torch.tensor([len(cut), table.numel()], device=x.device), 4)
    body = torch.cat([prefix, table, to_bytes(torch.tensor(directory, device=x.device), 4), *parts])
    if stats is not None:
        sent = [tile for tile in cut if id(tile) in coded]
        stats.order0_bits = order0_bits(counts) + sum(tile.raw_bits for tile in cut)
        stats.model_bits = sum(_coded_bits(tile, frequency) for tile in sent)
        stats.model_bits += sum(8 * tile.stored.numel() for tile in cut if id(tile) not in coded)
        stats.scale_bits = 8.0 * sum(tile.codes.numel() for tile in sent)
        stats.header_bits = 8.0 * (prefix.numel() + table.numel() + 12 * len(cut))
        stats.escapes = sum(tile.num_escapes for tile in sent)
        stats.empty_blocks = int((fields.codes == 0).sum())
    return body


def decode(body: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    """Returns the bytes of the encoded values, uint8 (numel * itemsize,); raises `CorruptPacket`."""
    reader = Reader(body)
    num_tiles, table_bytes = reader.integers(2, 4)
    if num_tiles != -(-numel // TILE_VALUES):
        raise CorruptPacket("the number of tiles is wrong", found=str(num_tiles))
    frequency = tables.parse(reader.take(table_bytes), ALPHABET) if table_bytes else None
    directory = reader.integers(3 * num_tiles, 4)
    num_blocks = -(-numel // BLOCK_VALUES)
    blocks = torch.zeros(num_blocks * BLOCK_VALUES * dtype.itemsize, dtype=torch.uint8, device=body.device)
    any_coded = False
    for i in range(num_tiles):
        tile_bytes, num_words, info = directory[3 * i : 3 * i + 3]
        out = blocks[i * TILE_VALUES * dtype.itemsize : (i + 1) * TILE_VALUES * dtype.itemsize]
        values = min(TILE_VALUES, numel - i * TILE_VALUES)
        content = Reader(reader.take(tile_bytes))
        if info & _CODED:
            if frequency is None:
                raise CorruptPacket("a coded tile without a frequency table", where=f"tile {i}")
            any_coded = True
            codes = block_codes.unpack(content, -(-values // BLOCK_VALUES))
            if dtype in FLOAT8_DTYPES and bool((codes > 1).any()):
                raise CorruptPacket("a block's code is out of range", expected="0 or 1 for float8")
            present = codes > 0
            out.view(-1, BLOCK_VALUES * dtype.itemsize)[present] = _decode_coded(
                content, frequency, codes[present], num_words, info, dtype
            ).view(-1, BLOCK_VALUES * dtype.itemsize)
            if bool(out[values * dtype.itemsize :].any()):
                raise CorruptPacket("a value behind the end of the tensor is not zero")
        elif info or num_words:
            raise CorruptPacket("a tile's directory entry is invalid", found=f"{info:#x}", where=f"tile {i}")
        elif tile_bytes:
            out[: values * dtype.itemsize] = content.take(values * dtype.itemsize)
            content.align4()
        content.end()
    reader.end()
    if frequency is not None and not any_coded:
        raise CorruptPacket("a frequency table that no tile uses")
    return blocks[: numel * dtype.itemsize]


def _cut_tile(x: Tensor, fields: Fields, first: int) -> _Tile:
    last = first + TILE_BLOCKS
    codes = fields.codes[first:last]
    present = (codes > 0).nonzero().view(-1) + first
    symbols = fields.symbols[present].view(-1, LANES)
    if not present.numel():
        nothing = x.new_zeros(0, dtype=torch.uint8)
        return _Tile(nothing, nothing, symbols, symbols, symbols, 0, 0, 0, 0)
    stored, packed = pad4(byte_view(x[first * BLOCK_VALUES : last * BLOCK_VALUES])), block_codes.pack(codes)
    if not fields.planes:
        carry = symbols[-2] | symbols[-1] << 8
        return _Tile(
            stored, packed, symbols, stored[:0], carry, symbols.shape[0] - _CARRIED_ROWS, 0, _CODED, 0
        )
    kept, escaped = fields.kept[present], fields.escaped[present]
    top = torch.where(kept, fields.planes[0][present], 0)
    raw, info = [top[:-1][kept[:-1]].to(torch.uint8)], _CODED
    for shift, plane in zip(_MODE_SHIFTS, fields.planes[1:], strict=False):
        mode, content = _low_plane(plane[present], kept)
        raw.append(content)
        info |= mode << shift
    raw.append(to_bytes(fields.values[present][escaped], x.dtype.itemsize))
    num_escapes, num_carried = int(escaped.sum()), int(kept[-1].sum())
    raw_bits = 8 * (sum(part.numel() for part in raw) + num_carried)
    carry = top[-1, :LANES] | top[-1, LANES:] << 8
    info |= num_escapes << _ESCAPES_SHIFT
    content = pad4(torch.cat(raw))
    return _Tile(stored, packed, symbols, content, carry, symbols.shape[0], raw_bits, info, num_escapes)


def _low_plane(plane: Tensor, kept: Tensor) -> tuple[int, Tensor]:
    """The mode of plane 1 or 2 and its bytes. plane, kept: (blocks with rows, 256)."""
    has_bytes = (torch.where(kept, plane, 0) != 0).any(1)
    content = plane[has_bytes][kept[has_bytes]].to(torch.uint8)
    if not bool(has_bytes.any()):
        return _ABSENT, content
    if bool(has_bytes.all()):
        return _WHOLE, content
    return _BY_BLOCK, torch.cat([tables.pack_bits(has_bytes.to(torch.int64)), content])


def _code_tiles(cut: list[_Tile], frequency: Tensor) -> list[tuple[Tensor, int]]:
    device = frequency.device
    num_rows = torch.tensor([tile.coded_rows for tile in cut], dtype=torch.int64, device=device)
    batch = torch.zeros((len(cut), int(num_rows.max()), LANES), dtype=torch.int64, device=device)
    for i, tile in enumerate(cut):
        batch[i, : tile.coded_rows] = tile.symbols[: tile.coded_rows]
    states, words = tiles.encode(batch, num_rows, frequency, torch.stack([tile.carry for tile in cut]))
    return [
        (
            torch.cat([tile.codes, to_bytes(states[i], 4), pad4(to_bytes(words[i], 2)), tile.raw]),
            words[i].numel(),
        )
        for i, tile in enumerate(cut)
    ]


def _decode_coded(
    content: Reader, frequency: Tensor, codes: Tensor, num_words: int, info: int, dtype: torch.dtype
) -> Tensor:
    """The bytes of the blocks with rows. codes: int64 (blocks with rows,)."""
    is_float8 = dtype in FLOAT8_DTYPES
    rows = 2 * codes.numel() - (_CARRIED_ROWS if is_float8 else 0)
    known = _CODED | (0 if is_float8 else -1 << _ESCAPES_SHIFT) | (0xF00 if dtype == torch.float32 else 0)
    if rows <= 0 or info & ~known or num_words > rows * LANES:
        raise CorruptPacket("a tile's directory entry is invalid", found=f"{info:#x}, {num_words} words")
    states = from_bytes(content.take(STATE_BYTES), 4)
    words = from_bytes(content.take(2 * num_words), 2)
    content.align4()
    num_rows = torch.tensor([rows], dtype=torch.int64, device=codes.device)
    decoded, carry = tiles.decode(states[None], [words], num_rows, frequency, padded=False)
    carried = torch.cat([carry[0] & 0xFF, carry[0] >> 8])
    if is_float8:
        content.end()
        return torch.cat([decoded.view(-1), carried]).to(torch.uint8)
    symbols = decoded.view(-1, BLOCK_VALUES)
    kept = (symbols != 0) & (symbols != ESCAPE)
    if bool(carried[~kept[-1]].any()):
        raise CorruptPacket("carried bits of a value that has none are not zero")
    top = torch.zeros_like(symbols)
    top[:-1][kept[:-1]] = content.take(int(kept[:-1].sum())).to(torch.int64)
    top[-1] = carried
    planes = [top]
    for shift in _MODE_SHIFTS[: exponents.num_planes(dtype) - 1]:
        planes.append(_read_low_plane(content, info >> shift & 3, kept))
    num_escapes = info >> _ESCAPES_SHIFT
    if num_escapes != int((symbols == ESCAPE).sum()):
        raise CorruptPacket("a tile's escapes do not match its directory entry")
    escapes = content.take(num_escapes * dtype.itemsize)
    content.align4()
    return exponents.merge(symbols, codes, planes, escapes, dtype)


def _read_low_plane(content: Reader, mode: int, kept: Tensor) -> Tensor:
    plane = torch.zeros(kept.shape, dtype=torch.int64, device=kept.device)
    if mode == _ABSENT:
        return plane
    if mode == _WHOLE:
        sent = kept
    elif mode == _BY_BLOCK:
        blocks = kept.shape[0]
        bits = tables.unpack_bits(content.take(-(-blocks // 8)))
        if bool(bits[blocks:].any()):
            raise CorruptPacket("padding is not zero", where="a plane's bitmap")
        sent = kept & (bits[:blocks, None] == 1)
    else:
        raise CorruptPacket("a plane's mode is unknown", expected="0, 1 or 2", found=str(mode))
    plane[sent] = content.take(int(sent.sum())).to(torch.int64)
    return plane


def _coded_bits(tile: _Tile, frequency: Tensor | None) -> float:
    assert frequency is not None
    counts = torch.bincount(tile.symbols[: tile.coded_rows].view(-1), minlength=ALPHABET)
    carried_symbols = (tile.rows - tile.coded_rows) * LANES
    return model_bits(counts, frequency) + 8 * carried_symbols + tile.raw_bits


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 4) * 4
