"""The exact codec at its edges: zeros, escapes, planes by block, stored tiles, threads, refused packets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import PacketStats, make_codec
from efficient_dl.codec.kernels.native.library import set_num_threads
from efficient_dl.codec.kernels.reference import block_codes, exponents, split, tables
from efficient_dl.codec.kernels.reference.wire import Reader
from efficient_dl.errors import CorruptPacket

KERNELS = ("reference", "portable", "native")
HEADER_BYTES = 32
TILE_VALUES = 32_768
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, *FLOAT8)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(INTEGERS[dtype.itemsize]).view(dtype)


def bytes_of(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def encoded(x: Tensor, kernel: str = "native", stats: PacketStats | None = None) -> Tensor:
    return make_codec("lossless", kernel=kernel, checksum=False).encode(x, stats=stats)


def decoded(packet: Tensor, like: Tensor, kernel: str = "native") -> Tensor:
    out = torch.full((like.numel(),), 7.0).to(like.dtype)
    make_codec("lossless", kernel=kernel, checksum=False).decode(packet, out)
    return out


@dataclass(frozen=True)
class Entry:
    offset: int  # of its three integers in the packet
    tile_bytes: int
    num_words: int
    info: int
    tile_offset: int
    codes: list[int]  # of the blocks of a coded tile
    codes_bytes: int

    @property
    def coded(self) -> bool:
        return self.info & 1 == 1

    @property
    def modes(self) -> tuple[int, int]:
        return self.info >> 8 & 3, self.info >> 10 & 3

    @property
    def escapes(self) -> int:
        return self.info >> 12


@dataclass(frozen=True)
class Parsed:
    table: Tensor
    entries: list[Entry]


def parsed(packet: Tensor) -> Parsed:
    """Reads a packet as docs/format.md says, without the codec's own parser."""
    raw = packet.numpy().tobytes()
    numel = struct.unpack_from("<I", raw, 8)[0]
    num_tiles, table_bytes = struct.unpack_from("<2I", raw, HEADER_BYTES)
    table_at = HEADER_BYTES + 8
    directory_at = table_at + table_bytes
    tile_at = directory_at + 12 * num_tiles
    entries: list[Entry] = []
    for t in range(num_tiles):
        fields = struct.unpack_from("<3I", raw, directory_at + 12 * t)
        num_blocks = min(128, -(-numel // 256) - 128 * t)
        codes = parsed_codes(raw[tile_at:], num_blocks) if fields[2] & 1 else ([], 0)
        entries.append(Entry(directory_at + 12 * t, *fields, tile_at, *codes))
        tile_at += fields[0]
    assert tile_at == len(raw)
    return Parsed(packet[table_at:directory_at], entries)


def parsed_codes(tile: bytes, num_blocks: int) -> tuple[list[int], int]:
    """The codes at the front of a coded tile, and the bytes they take."""
    low, width, empty, _ = tile[:4]
    num_bytes = -(-num_blocks * width // 32) * 4
    together = int.from_bytes(tile[4 : 4 + num_bytes], "little")
    fields = [together >> width * b & (1 << width) - 1 for b in range(num_blocks)]
    assert together >> width * num_blocks == 0
    return [0 if empty and not field else low + field - empty for field in fields], 4 + num_bytes


def spread_blocks() -> Tensor:
    """Blocks of one scale with a few values 2^±100 away: escapes."""
    x = normal(70_000)
    x[::97] = torch.ldexp(x[::97], torch.where(torch.arange(x[::97].numel()) % 2 == 0, 100.0, -110.0))
    return x


def low_bits_in_few_blocks() -> Tensor:
    x = normal(50_000).bfloat16().float()
    bits = x.view(torch.int32)
    bits[1000] |= 1  # plane 2 only
    bits[5000] |= 0x100  # plane 1 only
    bits[40_000:41_000] |= 0x4321
    return x


def with_empty_blocks(dtype: torch.dtype) -> Tensor:
    x = normal(3 * TILE_VALUES + 300)
    x[:700] = 0
    x[TILE_VALUES : 2 * TILE_VALUES] = 0  # a tile without rows
    x[-300:-44] = 0
    return x.to(dtype)


def edge_tensors() -> Iterator[tuple[str, Tensor]]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        width = 8 * dtype.itemsize
        yield f"zeros {name}", torch.zeros(40_000).to(dtype)
        yield f"one value {name}", torch.full((33_000,), -1.5).to(dtype)
        yield f"minus zero {name}", torch.full((33_000,), -0.0).to(dtype)
        yield f"some zeros {name}", (normal(70_000) * (normal(70_000, 1) > 0)).to(dtype)
        yield f"empty blocks and tiles {name}", with_empty_blocks(dtype)
        yield f"denormals {name}", from_bits(torch.arange(40_000) % 100, dtype)
        yield f"all top bits {name}", from_bits(torch.arange(70_000) << max(0, width - 16), dtype)
        tail = normal(TILE_VALUES + 1).to(dtype)
        tail[:-1] = 0
        yield f"one value behind a tile {name}", tail
    yield "escapes float32", spread_blocks()
    yield "escapes bfloat16", spread_blocks().bfloat16()
    yield "escapes only", from_bits(torch.arange(1000) % 2 * 0x7F80 + 1, torch.bfloat16).repeat(60)
    yield "low bits in few blocks", low_bits_in_few_blocks()
    yield (
        "low bits beside escapes",
        torch.where(normal(50_000, 3) > 2, spread_blocks()[:50_000], low_bits_in_few_blocks()),
    )
    nans = from_bits(
        torch.randint(0x7F80, 0x8000, (20_000,), generator=torch.Generator().manual_seed(1)), torch.bfloat16
    )
    yield "NaN payloads and infinities", torch.cat([nans, normal(20_000).bfloat16()])


EDGES = [pytest.param(x, id=name) for name, x in edge_tensors()]


@pytest.mark.parametrize("x", EDGES)
def test_edges_survive_in_every_kernel_with_the_same_bytes(x: Tensor) -> None:
    expected = encoded(x, "reference")
    assert expected.numel() <= make_codec("lossless").max_bytes(x.numel(), x.dtype)
    parsed(expected)
    for kernel in KERNELS:
        assert torch.equal(encoded(x, kernel), expected), kernel
        assert torch.equal(bytes_of(decoded(expected, x, kernel)), bytes_of(x)), kernel


@pytest.mark.parametrize("x", EDGES)
def test_stats_are_an_ideal_coders(x: Tensor) -> None:
    """model_bits, from the packet's own table and the symbols' definition."""
    stats = PacketStats()
    packet = encoded(x, stats=stats)
    content, fields = parsed(packet), exponents.split(x)
    frequency = tables.parse(content.table, 256) if content.table.numel() else None
    bits = 0.0
    for t, entry in enumerate(content.entries):
        blocks = slice(128 * t, 128 * (t + 1))
        present = fields.codes[blocks] > 0
        assert entry.codes in ([], fields.codes[blocks].tolist())
        if not entry.coded:
            bits += 8 * entry.tile_bytes
            continue
        assert frequency is not None
        symbols = fields.symbols[blocks][present].view(-1, 128)
        coded = symbols[:-2] if x.dtype in FLOAT8 else symbols
        bits += float((12 - frequency[coded].double().log2()).sum()) + 8 * (symbols.numel() - coded.numel())
        bits += 8 * x.dtype.itemsize * int(fields.escaped[blocks].sum())
        if x.dtype in FLOAT8:
            continue
        kept = fields.kept[blocks][present]
        bits += 8 * int(kept.sum())
        for mode, plane in zip(entry.modes, fields.planes[1:], strict=False):
            sent = (torch.where(kept, plane[blocks][present], 0) != 0).any(1)
            assert mode == (0 if not sent.any() else 1 if sent.all() else 2)
            bits += 8 * int(kept[sent].sum()) + (8 * -(-sent.numel() // 8) if mode == 2 else 0)
    assert stats.model_bits == pytest.approx(bits, rel=1e-9)
    assert stats.scale_bits == 8 * sum(entry.codes_bytes for entry in content.entries)
    assert stats.empty_blocks == int((fields.codes == 0).sum())
    assert stats.escapes == sum(entry.escapes for entry in content.entries)
    assert stats.header_bits == 8 * (HEADER_BYTES + 8 + content.table.numel() + 12 * len(content.entries))


def test_the_edges_are_what_they_say() -> None:
    entries = parsed(encoded(low_bits_in_few_blocks())).entries
    assert [entry.modes for entry in entries] == [(2, 2), (2, 2)]
    entries = parsed(encoded(spread_blocks())).entries
    assert all(entry.coded and entry.escapes > 100 for entry in entries[:2])
    content = parsed(encoded(with_empty_blocks(torch.bfloat16)))
    assert content.entries[1].tile_bytes == content.entries[1].info == 0
    assert content.entries[0].codes[:2] == [0, 0] and content.entries[0].codes[2] > 0
    assert not parsed(encoded(from_bits(torch.randperm(65_536) & 0xFFFF, torch.bfloat16))).table.numel()


def test_zeros_cost_their_directory() -> None:
    for dtype in DTYPES:
        assert encoded(torch.zeros(10 * TILE_VALUES).to(dtype)).numel() == HEADER_BYTES + 8 + 10 * 12


@pytest.mark.parametrize(
    ("codes", "num_bytes"),
    [
        ([7], 4),
        ([7] * 128, 4),
        ([255] * 128, 4),
        ([7, 0], 8),
        ([0] * 127 + [255], 20),
        ([1, 2] * 64, 20),
        ([100, 103, 0] * 30, 4 + 36),  # 1 … 4 and 0: three bits
        (list(range(1, 129)), 4 + 112),
        ([1, 255] * 64, 4 + 128),
        ([0, *range(1, 256)][::2], 4 + 128),
        ([0, 1, 255], 8),
    ],
    ids=lambda case: str(case)[:24],
)
def test_codes_take_the_bits_of_their_range(codes: list[int], num_bytes: int) -> None:
    section = block_codes.pack(torch.tensor(codes))
    assert section.numel() == num_bytes
    assert parsed_codes(section.numpy().tobytes(), len(codes)) == (codes, num_bytes)
    assert block_codes.unpack(Reader(section), len(codes)).tolist() == codes


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda low, width, empty: (low, 8, empty), id="wide fields"),
        pytest.param(lambda low, width, empty: (low - 3, width + 1, empty), id="a small low"),
        pytest.param(lambda low, width, empty: (low, width + 1, 1), id="no block is empty"),
    ],
)
def test_codes_may_take_more_bits_than_they_need(
    change: Callable[[int, int, int], tuple[int, int, int]],
) -> None:
    x = (normal(9 * 256) * torch.exp2(torch.arange(9.0)).repeat_interleave(256)).bfloat16()
    packet = encoded(x)
    (entry,) = parsed(packet).entries
    low, width, empty = change(*packet[entry.tile_offset : entry.tile_offset + 3].tolist())
    together = sum(code - low + empty << width * b for b, code in enumerate(entry.codes))
    fields = together.to_bytes(-(-9 * width // 32) * 4, "little")
    section = torch.tensor([low, width, empty, 0, *fields], dtype=torch.uint8)
    assert section.numel() >= entry.codes_bytes
    front, behind = packet[: entry.tile_offset], packet[entry.tile_offset + entry.codes_bytes :]
    longer = patch(torch.cat([front, section, behind]), entry.offset, section.numel() + behind.numel())
    longer = patch(longer, 16, longer.numel())
    for kernel in KERNELS:
        assert torch.equal(bytes_of(decoded(longer, x, kernel)), bytes_of(x)), kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tile_of_zeros_may_be_stored(kernel: str) -> None:
    x = torch.zeros(300, dtype=torch.bfloat16)
    packet = torch.cat([encoded(x), torch.zeros(600, dtype=torch.uint8)])
    packet = patch(patch(packet, HEADER_BYTES + 8, 600), 16, packet.numel())
    assert torch.equal(bytes_of(decoded(packet, x, kernel)), bytes_of(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kibibyte_grows_by_no_more_than_64_bytes(dtype: torch.dtype) -> None:
    numel = 1024 // dtype.itemsize
    for seed in range(20):
        # From one symbol to all: somewhere between, coding saves less than its table.
        spread = torch.randint(
            0, 1 << seed * 8 * dtype.itemsize // 19, (numel,), generator=torch.Generator().manual_seed(seed)
        )
        assert encoded(from_bits(spread, dtype)).numel() <= 1024 + 64


def test_a_table_is_sent_only_where_it_pays() -> None:
    sizes: list[int] = []
    for numel in range(256, 8192, 256):
        x = (normal(numel) * torch.exp2(8 * normal(numel, 1))).bfloat16()
        packet = encoded(x)
        content = parsed(packet)
        stored = HEADER_BYTES + 8 + 12 + 2 * numel
        assert packet.numel() < stored if content.table.numel() else packet.numel() == stored
        sizes.append(content.table.numel())
    assert sizes[0] == 0 and sizes[-1] > 0


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_byte(dtype: torch.dtype) -> None:
    x = torch.cat([normal(20 * TILE_VALUES), torch.zeros(3 * TILE_VALUES), normal(700_001, 2) * 1e-3]).to(
        dtype
    )
    set_num_threads(1)
    expected = encoded(x)
    for count in (1, 2, 3, 8):
        set_num_threads(count)
        for _ in range(3):
            assert torch.equal(encoded(x), expected), count
            assert torch.equal(bytes_of(decoded(expected, x)), bytes_of(x)), count


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_sums_are_torchs(dtype: torch.dtype) -> None:
    """Every 8-bit value plus every 8-bit value, rounded as torch rounds, or in float32."""
    every = torch.arange(256).to(torch.uint8).view(dtype)
    x, start = every.repeat(256), every.repeat_interleave(256)
    packet = encoded(x)
    expected = (start.float() + x.float()).to(dtype)
    for kernel in KERNELS:
        codec = make_codec("lossless", kernel=kernel, checksum=False)
        total, wide = start.clone(), torch.zeros(x.numel())
        codec.decode(packet, total, accumulate=True)
        codec.decode(packet, wide)
        is_nan = expected.float().isnan()
        assert torch.equal(total.float().isnan(), is_nan)
        assert torch.equal(bytes_of(total)[~is_nan], bytes_of(expected)[~is_nan])
        assert torch.equal(wide.isnan(), x.float().isnan())
        assert torch.equal(
            wide.nan_to_num(9e9).view(torch.int32), x.float().nan_to_num(9e9).view(torch.int32)
        )


def patch(packet: Tensor, offset: int, value: int) -> Tensor:
    damaged = packet.clone()
    damaged[offset : offset + 4] = torch.frombuffer(bytearray(struct.pack("<I", value)), dtype=torch.uint8)
    return damaged


def flipped(packet: Tensor, offset: int, bits: int) -> Tensor:
    damaged = packet.clone()
    damaged[offset] ^= bits
    return damaged


def head(low: int, width: int, empty: int = 0, reserved: int = 0) -> int:
    """Of a tile's codes."""
    return low | width << 8 | empty << 16 | reserved << 24


Damage = Callable[[Tensor, Parsed], Tensor]
DAMAGES: dict[str, Damage] = {
    "more words than symbols": lambda p, c: patch(p, c.entries[0].offset + 4, 128 * 256 + 1),
    "a word less": lambda p, c: patch(p, c.entries[0].offset + 4, c.entries[0].num_words - 1),
    "two words more": lambda p, c: patch(p, c.entries[0].offset + 4, c.entries[0].num_words + 2),
    "an escape too many": lambda p, c: patch(p, c.entries[0].offset + 8, c.entries[0].info + (1 << 12)),
    "an unknown bit": lambda p, c: patch(p, c.entries[0].offset + 8, c.entries[0].info | 2),
    "mode 3": lambda p, c: patch(p, c.entries[0].offset + 8, c.entries[0].info | 0x300),
    "a coded tile called stored": lambda p, c: patch(p, c.entries[0].offset + 8, 0),
    "another number of tiles": lambda p, c: patch(p, HEADER_BYTES, 3),
    "no table": lambda p, c: patch(p, HEADER_BYTES + 4, 0),
    "no lowest code": lambda p, c: patch(p, c.entries[0].tile_offset, head(0, 3)),
    "a code above 255": lambda p, c: patch(p, c.entries[0].tile_offset, head(251, 3)),
    "nine bits a code": lambda p, c: patch(p, c.entries[0].tile_offset, head(1, 9)),
    "another width": lambda p, c: patch(p, c.entries[0].tile_offset, head(100, 2)),
    "empty 2": lambda p, c: patch(p, c.entries[0].tile_offset, head(100, 3, 2)),
    "a head's last byte": lambda p, c: patch(p, c.entries[0].tile_offset, head(100, 3, 0, 1)),
    "rows less": lambda p, c: patch(p, c.entries[0].tile_offset, head(100, 3, 1)),
    "codes' unused bits": lambda p, c: flipped(p, c.entries[1].tile_offset + 4 + 10, 1 << 7),
    "codes' padding": lambda p, c: flipped(p, c.entries[1].tile_offset + 4 + 11, 1),
    "padding": lambda p, c: patch(p, len(p) - 4, struct.unpack("<I", p[-4:].numpy().tobytes())[0] | 1 << 31),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_contradictions_are_refused(damage: str, kernel: str) -> None:
    x = normal(40_000)
    x[:39_936].view(-1, 256)[::2] *= 32  # codes in 3 bits: of the last tile's 29, 87 bits in 11 bytes
    x[-1], x[::5] = 1.5, 0
    while encoded(x)[-1] != 0:  # until the last tile ends in padding
        x[-1 - int((x[-200:] == 0).sum())] = 0
    packet = encoded(x)
    content = parsed(packet)
    assert all(entry.coded for entry in content.entries) and content.entries[1].codes_bytes == 4 + 12
    with pytest.raises(CorruptPacket):
        decoded(DAMAGES[damage](packet, content), x, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_behind_the_end_are_refused(dtype: torch.dtype, kernel: str) -> None:
    x = normal(TILE_VALUES + 8000).to(dtype)
    packet = patch(encoded(x), 8, x.numel() - 10)  # the header's numel: as many blocks, fewer values
    assert parsed(packet).entries[-1].coded
    with pytest.raises(CorruptPacket):
        decoded(packet, x[:-10], kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float8_codes_are_0_or_1(kernel: str) -> None:
    x = normal(40_000).to(torch.float8_e5m2)
    packet = encoded(x)
    packet[parsed(packet).entries[0].tile_offset] = 2
    with pytest.raises(CorruptPacket):
        decoded(packet, x, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_carried_bits_of_a_zero_are_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(TILE_VALUES).bfloat16()
    x[-128] = 0
    cut_tile = split._cut_tile

    def with_a_bit_too_many(*arguments: Any) -> Any:
        tile = cut_tile(*arguments)
        tile.carry[0] |= 1 << 8  # row R - 1, lane 0: the zero
        return tile

    assert torch.equal(bytes_of(decoded(encoded(x, "reference"), x, kernel)), bytes_of(x))
    monkeypatch.setattr(split, "_cut_tile", with_a_bit_too_many)
    with pytest.raises(CorruptPacket):
        decoded(encoded(x, "reference"), x, kernel)
