"""The exact codec in torch: exponents entropy-coded, sign and mantissa bits as they are (docs/format.md, codec 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference import tables, tiles
from efficient_dl.codec.kernels.reference.tiles import LANES, STATE_BYTES
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, pad4, to_bytes
from efficient_dl.errors import CorruptPacket

TILE_VALUES = 256 * LANES
ALPHABET = 256
SPLIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CODED_ROWS = 3


@dataclass
class _Tile:
    symbols: Tensor  # uint8 (m,)
    planes: list[Tensor]  # uint8 (m,) each; trailing all-zero planes left out

    @property
    def rows(self) -> int:
        return self.symbols.numel() // LANES


def encode(x: Tensor, stats: PacketStats | None) -> Tensor:
    """Returns the body of a lossless packet, uint8. x: 1-D, float32, bfloat16 or float16."""
    symbols, planes = _split(x)
    cut = [_cut_tile(symbols, planes, start) for start in range(0, x.numel(), TILE_VALUES)]
    candidates = [tile for tile in cut if tile.rows >= _MIN_CODED_ROWS]
    contents: dict[int, Tensor] = {}
    frequency = None
    if candidates:
        rows = torch.cat([tile.symbols[: tile.rows * LANES] for tile in candidates])
        counts = torch.bincount(rows.to(torch.int64), minlength=ALPHABET)
        frequency = tables.normalize(counts)
        for tile, coded in zip(candidates, _code_tiles(candidates, frequency), strict=True):
            if coded.numel() < _stored_bytes(tile):
                contents[id(tile)] = coded
    table = tables.serialize(frequency) if frequency is not None and contents else symbols[:0]
    directory: list[int] = []
    parts: list[Tensor] = []
    for tile in cut:
        coded = contents.get(id(tile))
        content = pad4(torch.cat([tile.symbols, *tile.planes])) if coded is None else coded
        directory += [content.numel(), (coded is not None) | len(tile.planes) << 8]
        parts.append(content)
    prefix = to_bytes(torch.tensor([len(cut), table.numel()], device=x.device), 4)
    body = torch.cat([prefix, table, to_bytes(torch.tensor(directory, device=x.device), 4), *parts])
    if stats is not None:
        raw_bits = sum(8 * tile.symbols.numel() * len(tile.planes) for tile in cut)
        stats.order0_bits = (
            order0_bits(torch.bincount(symbols.to(torch.int64), minlength=ALPHABET)) + raw_bits
        )
        stats.model_bits = raw_bits + sum(
            _symbol_bits(t, frequency if id(t) in contents else None) for t in cut
        )
        stats.header_bits = 8.0 * (prefix.numel() + table.numel() + 8 * len(cut))
    return body


def decode(body: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    """Returns the encoded values, 1-D of dtype; raises `CorruptPacket`."""
    reader = Reader(body)
    num_tiles, table_bytes = reader.integers(2, 4)
    if num_tiles != -(-numel // TILE_VALUES):
        raise CorruptPacket("the number of tiles is wrong", found=str(num_tiles))
    frequency = tables.parse(reader.take(table_bytes), ALPHABET) if table_bytes else None
    directory = reader.integers(2 * num_tiles, 4)
    num_planes = 3 if dtype == torch.float32 else 1
    symbols = torch.empty(numel, dtype=torch.uint8, device=body.device)
    planes = [torch.zeros(numel, dtype=torch.uint8, device=body.device) for _ in range(num_planes)]
    any_coded = False
    for i in range(num_tiles):
        tile_bytes, info = directory[2 * i : 2 * i + 2]
        here = slice(i * TILE_VALUES, min(numel, (i + 1) * TILE_VALUES))
        coded, present = info & 1, info >> 8
        if info & ~0x301 or not 1 <= present <= num_planes or (coded and frequency is None):
            raise CorruptPacket("a tile's directory entry is invalid", found=f"{info:#x}", where=f"tile {i}")
        any_coded |= bool(coded)
        content = Reader(reader.take(tile_bytes))
        target = [plane[here] for plane in planes[:present]]
        if coded and frequency is not None:
            _decode_coded(content, frequency, symbols[here], target)
        else:
            for part in (symbols[here], *target):
                part.copy_(content.take(part.numel()))
        content.align4()
        content.end()
    reader.end()
    if frequency is not None and not any_coded:
        raise CorruptPacket("a frequency table that no tile uses")
    return _merge(symbols, planes, dtype)


def _split(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    if x.dtype == torch.float32:
        bits = x.view(torch.int32)
        low = [(bits >> 8 & 0xFF).to(torch.uint8), (bits & 0xFF).to(torch.uint8)]
        bits = bits >> 16
    else:
        bits, low = x.view(torch.int16).to(torch.int32), list[Tensor]()
    symbols = (bits >> 7 & 0xFF).to(torch.uint8)
    return symbols, [(bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8), *low]


def _merge(symbols: Tensor, planes: list[Tensor], dtype: torch.dtype) -> Tensor:
    top = planes[0].to(torch.int32)
    bits = (top & 0x80) << 8 | symbols.to(torch.int32) << 7 | top & 0x7F
    if dtype == torch.float32:
        bits = bits << 16 | planes[1].to(torch.int32) << 8 | planes[2].to(torch.int32)
        return bits.view(torch.float32)
    return (bits - ((bits & 0x8000) << 1)).to(torch.int16).view(dtype)


def _cut_tile(symbols: Tensor, planes: list[Tensor], start: int) -> _Tile:
    here = slice(start, min(symbols.numel(), start + TILE_VALUES))
    present = [plane[here] for plane in planes]
    while len(present) > 1 and not bool(present[-1].any()):
        present.pop()
    return _Tile(symbols[here], present)


def _stored_bytes(tile: _Tile) -> int:
    return -(-tile.symbols.numel() * (1 + len(tile.planes)) // 4) * 4


def _code_tiles(cut: list[_Tile], frequency: Tensor) -> list[Tensor]:
    device = frequency.device
    num_rows = torch.tensor([tile.rows for tile in cut], dtype=torch.int64, device=device)
    batch = torch.zeros((len(cut), int(num_rows.max()), LANES), dtype=torch.int64, device=device)
    carry = torch.zeros((len(cut), LANES), dtype=torch.int64, device=device)
    for i, tile in enumerate(cut):
        batch[i, : tile.rows] = tile.symbols[: tile.rows * LANES].view(-1, LANES).to(torch.int64)
        last_two = tile.planes[0][(tile.rows - 2) * LANES : tile.rows * LANES].to(torch.int64).view(2, LANES)
        carry[i] = last_two[0] | last_two[1] << 8
    states, words = tiles.encode(batch, num_rows, frequency, carry)
    return [_coded_bytes(tile, states[i], words[i]) for i, tile in enumerate(cut)]


def _coded_bytes(tile: _Tile, states: Tensor, words: Tensor) -> Tensor:
    coded, carried = tile.rows * LANES, 2 * LANES
    stream = pad4(torch.cat([to_bytes(states, 4), to_bytes(words, 2)]))
    first = torch.cat([tile.planes[0][: coded - carried], tile.planes[0][coded:]])
    return pad4(torch.cat([stream, tile.symbols[coded:], first, *tile.planes[1:]]))


def _decode_coded(content: Reader, frequency: Tensor, symbols: Tensor, planes: list[Tensor]) -> None:
    values = symbols.numel()
    rows = values // LANES
    coded, carried = rows * LANES, 2 * LANES
    if rows < _MIN_CODED_ROWS:
        raise CorruptPacket("a tile of fewer than 3 rows cannot be coded")
    behind = (values - coded) + (values - carried) + values * (len(planes) - 1)
    stream_bytes = content.remaining - -(-behind // 4) * 4
    states = from_bytes(content.take(STATE_BYTES), 4)
    stream = content.take(stream_bytes - STATE_BYTES)
    num_rows = torch.tensor([rows], dtype=torch.int64, device=symbols.device)
    decoded, carry = tiles.decode(states[None], [from_bytes(stream, 2)], num_rows, frequency)
    symbols[:coded] = decoded.view(-1).to(torch.uint8)
    symbols[coded:] = content.take(values - coded)
    first = content.take(values - carried)
    planes[0][: coded - carried] = first[: coded - carried]
    planes[0][coded - carried : coded] = torch.cat([carry[0] & 0xFF, carry[0] >> 8]).to(torch.uint8)
    planes[0][coded:] = first[coded - carried :]
    for plane in planes[1:]:
        plane.copy_(content.take(values))


def _symbol_bits(tile: _Tile, frequency: Tensor | None) -> float:
    coded = tile.rows * LANES if frequency is not None else 0
    bits = 8.0 * (tile.symbols.numel() - coded)
    if frequency is not None:
        counts = torch.bincount(tile.symbols[:coded].to(torch.int64), minlength=ALPHABET)
        bits += model_bits(counts, frequency)
    return bits
