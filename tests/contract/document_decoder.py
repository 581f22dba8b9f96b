"""A second decoder of the packets, written from docs/format.md alone: plain Python and NumPy, made to be read.

It shares no code with the package but the two exceptions that the document names, so a test that compares the two
tells whether the document still says what the codecs do. Each function names the section that it follows.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from efficient_dl.errors import CorruptPacket, SideMismatch

FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2 = range(5)
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT8_E4M3: 1, FLOAT8_E5M2: 1}
IDENTITY, LOSSLESS, BLOCK, GRID, DELTA = range(5)
CHECKSUM, BOUNDED = 1, 2
BLOCK_VALUES, LANES = 256, 128

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def require(condition: object, problem: str) -> None:
    """Refuse the packet unless the condition holds."""
    if not condition:
        raise CorruptPacket(problem)


class Reader:
    """Reads a part of a packet from front to back. Alignment counts from the part's first byte."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        require(0 <= count <= len(self.data) - self.at, "the packet ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def integers(self, count: int, kind: str) -> Integers:
        """`count` little-endian integers of a NumPy type such as "u4" or "i2"."""
        return np.frombuffer(self.take(count * int(kind[1:])), "<" + kind).astype(np.int64)

    def pad(self) -> None:
        """Zero bytes up to a multiple of 4."""
        require(not any(self.take(-self.at % 4)), "padding is not zero")

    def end(self) -> None:
        require(self.at == len(self.data), "bytes are left over")


# ------------------------------------------------------------------------------------------------ the packet


def decode(
    packet: bytes,
    numel: int,
    segments: tuple[int, ...] | None = None,
    reference: bytes | None = None,
    step: float | None = None,
) -> bytes:
    """The bytes of the tensor in a packet ("Header, 32 bytes" and the codecs' sections)."""
    require(len(packet) >= 32, "shorter than a header")
    magic, version, codec, dtype, flags, count, fingerprint, size, checksum = struct.unpack_from(
        "<4sBBBBIIQQ", packet
    )
    require(magic == b"EDLP", "wrong magic")
    require(version == 2, "unknown version")
    require(codec in (IDENTITY, LOSSLESS, BLOCK, GRID, DELTA), "unknown codec")
    require(dtype in ITEM_BYTES, "unknown dtype")
    require(flags & ~(CHECKSUM | BOUNDED) == 0, "unknown flags")
    require(not flags & BOUNDED or codec == BLOCK, "only codec 2 has bounded packets")
    require(32 <= size <= len(packet) if flags & BOUNDED else size == len(packet), "wrong packet length")
    require(count == numel and numel < 2**31, "wrong number of values")
    if fingerprint != side_fingerprint(dtype, numel, segments, reference, step):
        raise SideMismatch("encoded with other side information")
    body = packet[32:size]
    require(checksum == (xxhash.xxh3_64_intdigest(body) if flags & CHECKSUM else 0), "wrong checksum")

    if numel == 0:
        require(not body, "an empty tensor has no body")
        return b""
    if codec == IDENTITY:
        require(len(body) == numel * ITEM_BYTES[dtype], "wrong body length")
        return body
    if codec == LOSSLESS:
        return decode_lossless(body, numel, dtype)
    grid = block_grid(numel, segments)
    if codec == BLOCK:
        return decode_block_quantizer(body, numel, dtype, grid)
    if codec == GRID:
        return decode_grid_quantizer(body, numel, dtype, grid)
    if reference is None:
        raise SideMismatch("a delta cannot be decoded without its reference")
    return decode_delta(body, numel, dtype, block_grid(numel, None), reference)


def side_fingerprint(
    dtype: int, numel: int, segments: tuple[int, ...] | None, reference: bytes | None, step: float | None
) -> int:
    """The hash of a side's canonical bytes, 0 without a side ("Header, 32 bytes")."""
    parts = b""
    if segments is not None:
        parts += b"segments" + struct.pack(f"<{len(segments)}q", *segments)
    if step is not None:
        parts += b"step" + struct.pack("<f", step)
    if reference is not None:
        parts += b"reference" + struct.pack("<Bq", dtype, numel)
        parts += struct.pack("<Q", xxhash.xxh3_64_intdigest(reference))
    return xxhash.xxh3_64_intdigest(parts) & 0xFFFFFFFF if parts else 0


class Block(NamedTuple):
    """`length` consecutive values from `start` on."""

    start: int
    length: int


def block_grid(numel: int, segments: tuple[int, ...] | None) -> list[Block]:
    """The blocks of a tensor: the grid restarts at each segment ("Segments and the block grid")."""
    blocks, start = [], 0
    for length in (numel,) if segments is None else segments:
        for at in range(0, length, BLOCK_VALUES):
            blocks.append(Block(start + at, min(BLOCK_VALUES, length - at)))
        start += length
    if start != numel:
        raise SideMismatch("the segments' lengths do not sum to numel")
    return blocks


# ------------------------------------------------------------------------------------------------ tile coder


class Table(NamedTuple):
    """A frequency table: per symbol its frequency and start, per slot its symbol."""

    frequency: Integers
    start: Integers
    symbol: Bytes


def read_table(reader: Reader, alphabet: int) -> Table:
    """A serialized table ("Frequency tables"), which must begin at a multiple of 4."""
    bitmap = np.frombuffer(reader.take(-(-alphabet // 8)), np.uint8)
    present = np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
    require(len(present) and present[-1] < alphabet, "a table with no symbol or one outside the alphabet")
    fields = np.frombuffer(reader.take(-(-12 * len(present) // 8)), np.uint8)
    bits = np.unpackbits(fields, bitorder="little")
    require(not bits[12 * len(present) :].any(), "padding is not zero")
    reader.pad()
    frequency = np.zeros(alphabet, np.int64)
    frequency[present] = bits[: 12 * len(present)].reshape(-1, 12) @ (1 << np.arange(12)) + 1
    require(frequency.sum() == 4096, "a table's frequencies do not sum to 4096")
    symbol = np.repeat(np.arange(alphabet, dtype=np.uint8), frequency)
    return Table(frequency, np.cumsum(frequency) - frequency, symbol)


def decode_rows(reader: Reader, tables: list[Table], num_words: int | None = None) -> tuple[Bytes, Integers]:
    """The symbols of a coded tile's rows and the 16 bits each lane carried ("The tile coder").

    One table a row. Where the number of words is not known from elsewhere it is what the rows consume.
    """
    x = reader.integers(LANES, "u4")
    limit = (len(reader.data) - reader.at) // 2 if num_words is None else num_words
    words = Reader(reader.data[reader.at :]).integers(limit, "u2")
    used = 0
    symbols = np.zeros((len(tables), LANES), np.uint8)
    for r, table in enumerate(tables):
        slot = x & 4095
        symbols[r] = s = table.symbol[slot]
        x = table.frequency[s] * (x >> 12) + slot - table.start[s]
        low = np.flatnonzero(x < 2**16)
        require(used + len(low) <= limit, "words are missing")
        x[low] = (x[low] << 16) | words[used : used + len(low)]
        used += len(low)
    require(num_words in (None, used), "words are left over")
    require(((x >= 2**16) & (x < 2**17)).all(), "a lane does not end where it began")
    reader.take(2 * used)
    reader.pad()
    return symbols, x - 2**16


def read_directory(reader: Reader, num_tiles: int, fields: int) -> list[list[int]]:
    """The directory: `fields` u32 for each tile, the first of which is the tile's bytes."""
    return reader.integers(num_tiles * fields, "u4").reshape(num_tiles, fields).tolist()


# ------------------------------------------------------------------------------------------------ codec 1


def decode_lossless(body: bytes, numel: int, dtype: int) -> bytes:
    """Section "Codec 1, lossless"."""
    num_blocks = -(-numel // BLOCK_VALUES)
    reader = Reader(body)
    num_tiles, table_bytes = reader.integers(2, "u4").tolist()
    require(num_tiles == -(-num_blocks // 128), "wrong number of tiles")
    table = read_only_table(reader, table_bytes, 256)
    directory = read_directory(reader, num_tiles, 3)
    require((table is not None) == any(info & 1 for _, _, info in directory), "table without use, or none")

    values = np.zeros((num_blocks, 2, LANES), f"u{ITEM_BYTES[dtype]}")  # [block, row of the block, lane]
    for tile, (tile_bytes, num_words, info) in enumerate(directory):
        blocks = slice(128 * tile, 128 * tile + 128)
        part = Reader(reader.take(tile_bytes))
        require(tile_bytes % 4 == 0, "a tile is not padded")
        if info & 1:
            codes = read_block_codes(part, len(values[blocks]))
            require(ITEM_BYTES[dtype] > 1 or codes.max() <= 1, "a float8 block's code is 0 or 1")
            with_rows = np.flatnonzero(codes)
            require(len(with_rows), "a coded tile without rows")
            assert table is not None  # as checked above
            rows = codes[with_rows].repeat(2)
            coded = decode_lossless_tile(part, rows, table, num_words, info, dtype)
            values[blocks][with_rows] = coded.reshape(-1, 2, LANES)
        else:
            require(num_words == 0 and info == 0, "a stored tile has words or info")
            if tile_bytes:
                count = min(128 * BLOCK_VALUES, numel - 128 * BLOCK_VALUES * tile)
                flat = values.reshape(-1)[128 * BLOCK_VALUES * tile :]
                flat[:count] = part.integers(count, f"u{ITEM_BYTES[dtype]}")
                part.pad()
        part.end()
    reader.end()
    require(not values.reshape(-1)[numel:].any(), "a value behind the end of the tensor")
    return values.reshape(-1)[:numel].astype(f"<u{ITEM_BYTES[dtype]}").tobytes()


def read_block_codes(part: Reader, num_blocks: int) -> Integers:
    """The codes of a coded tile's blocks ("Codes" of codec 1)."""
    low, width, empty, reserved = part.integers(4, "u1").tolist()
    require(low >= 1 and width <= 8 and empty <= 1 and reserved == 0, "the head of a tile's codes")
    bits = np.unpackbits(np.frombuffer(part.take(-(-num_blocks * width // 8)), np.uint8), bitorder="little")
    require(not bits[num_blocks * width :].any(), "padding is not zero")
    part.pad()
    fields = bits[: num_blocks * width].reshape(num_blocks, width) @ (1 << np.arange(width, dtype=np.int64))
    codes = np.where((fields == 0) & (empty == 1), 0, low + fields - empty)
    require(int(codes.max()) <= 255, "a code above 255")
    return codes


def read_only_table(reader: Reader, table_bytes: int, alphabet: int) -> Table | None:
    """The one table of a packet of codec 1 or 2, None if it is absent."""
    part = Reader(reader.take(table_bytes))
    table = read_table(part, alphabet) if table_bytes else None
    part.end()
    return table


def decode_lossless_tile(
    part: Reader, codes: Integers, table: Table, num_words: int, info: int, dtype: int
) -> Integers:
    """The values of the rows of a coded tile ("Coded tile" of codec 1). `codes`: of each row's block."""
    num_rows = len(codes)
    if ITEM_BYTES[dtype] == 1:
        require(num_rows >= 4 and info == 1, "a coded float8 tile has at least 4 rows, and no planes")
        symbols, carry = decode_rows(part, [table] * (num_rows - 2), num_words)
        return np.concatenate([symbols.astype(np.int64), [carry & 255, carry >> 8]])
    symbols, carry = decode_rows(part, [table] * num_rows, num_words)
    escaped = symbols == 255
    plain = (symbols != 0) & ~escaped

    exponent = (symbols.astype(np.int64) + codes[:, None] - 96) & 255
    plane = np.zeros((num_rows, LANES), np.int64)
    sent = plain & (np.arange(num_rows) < num_rows - 2)[:, None]
    plane[sent] = part.integers(int(sent.sum()), "u1")
    plane[-2:] = [carry & 255, carry >> 8]
    require(not plane[~plain].any(), "a carried byte of a zero or an escape is not zero")
    values = (plane & 0x80) << 8 | exponent << 7 | plane & 0x7F

    modes = [info >> 8 & 3, info >> 10 & 3]
    require(info & 0xFE == 0 and modes[0] < 3 and modes[1] < 3, "unknown bits in a tile's info")
    require(dtype == FLOAT32 or modes == [0, 0], "planes of a 16-bit dtype")
    if dtype == FLOAT32:
        for mode in modes:
            sent = plain & (mode == 1)
            if mode == 2:
                bitmap = np.frombuffer(part.take(-(-num_rows // 16)), np.uint8)
                bits = np.unpackbits(bitmap, bitorder="little").astype(bool)
                require(not bits[num_rows // 2 :].any(), "padding is not zero")
                sent = plain & bits[: num_rows // 2].repeat(2)[:, None]
            plane = np.zeros((num_rows, LANES), np.int64)
            plane[sent] = part.integers(int(sent.sum()), "u1")
            values = values << 8 | plane
    values[~plain] = 0
    require(info >> 12 == escaped.sum(), "wrong number of escapes")
    values[escaped] = part.integers(int(escaped.sum()), f"u{ITEM_BYTES[dtype]}")
    part.pad()
    return values


# ------------------------------------------------------------------------------------------------ codecs 2 to 4


class Row(NamedTuple):
    """A row of integers: of pairs (lane l holds values l and 128 + l of the block) or of bytes (half a block)."""

    block: Block
    pairs: bool
    half: int  # 0 or 1; of byte rows
    table: Table | None

    @property
    def lanes(self) -> int:
        """The lanes that a stored tile has."""
        return min(max(self.block.length - 128 * self.half, 0), LANES)


def block_rows(block: Block, pairs: bool, table: Table | None) -> list[Row]:
    """One row of pairs or two rows of bytes ("Symbols" of codec 2, "Rows" of codecs 3 and 4)."""
    return [Row(block, pairs, half, table) for half in range(1 if pairs else 2)]


def decode_integer_tile(
    part: Reader, info: int, rows: list[Row], carried: bool, width: int, q: Integers
) -> None:
    """Decode a tile of integers into the tensor's q ("Tiles" of codec 2 and of codecs 3 and 4).

    carried: the last two rows are in the lanes' carries (codec 2). width: bytes of an escaped integer.
    """
    zero = np.array([60 if row.pairs else 127 for row in rows], np.uint8)
    symbols = np.repeat(zero[:, None], LANES, axis=1)
    if info & 1:
        require(len(rows) > (2 if carried else 0), "too few rows for a coded tile")
        tables = [row.table for row in rows[: len(rows) - 2 * carried] if row.table is not None]
        require(len(tables) == len(rows) - 2 * carried, "a coded tile without a table")
        symbols[: len(tables)], carry = decode_rows(part, tables)
        if carried:
            symbols[-2:] = [carry & 255, carry >> 8]
        else:
            require(not carry.any(), "a lane carries bits")
    else:
        for r, row in enumerate(rows):
            symbols[r, : row.lanes] = part.integers(row.lanes, "u1")
        part.pad()

    num_escapes = 0  # in codec 2 symbols, in codecs 3 and 4 values: a pair has two
    for s, row in zip(symbols.astype(np.int64), rows, strict=True):
        escaped = s == (121 if row.pairs else 255)
        num_escapes += int(escaped.sum()) * (2 if row.pairs and not carried else 1)
        values = np.zeros((BLOCK_VALUES if row.pairs else LANES), np.int64)
        if row.pairs:
            require(s.max() <= 121, "a symbol outside the alphabet")
            values[:LANES], values[LANES:] = s // 11 - 5, s % 11 - 5
            sent = part.integers(2 * int(escaped.sum()), f"i{width}").reshape(-1, 2)
            values[:LANES][escaped], values[LANES:][escaped] = sent[:, 0], sent[:, 1]
        else:
            values[:] = s - 127
            values[escaped] = part.integers(int(escaped.sum()), f"i{width}")
        count = max(row.block.length - 128 * row.half, 0)
        require(not values[count:].any(), "a value behind the end of a short block")
        at = row.block.start + 128 * row.half
        q[at : at + min(count, len(values))] = values[:count]
    require(num_escapes == info >> 1, "wrong number of escapes")
    part.pad()


def round_to(values: npt.NDArray[np.float32], dtype: int) -> bytes:
    """float32 values as the bytes of a dtype, rounded to nearest even; NaN as in "Symbols" of codec 2."""
    nan = np.isnan(values)
    values = np.where(nan, np.float32(0), values)
    with np.errstate(over="ignore"):  # beyond the largest value of float16: infinity
        if dtype == FLOAT32:
            return np.where(nan, 0x7FC00000, values.view(np.uint32)).astype("<u4").tobytes()
        if dtype == BFLOAT16:
            bits = values.view(np.uint32).astype(np.int64)
            return np.where(nan, 0x7FC0, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2").tobytes()
        if dtype == FLOAT16:
            return np.where(nan, 0x7E00, values.astype("<f2").view("<u2")).astype("<u2").tobytes()
        mantissa_bits, smallest = (3, -6) if dtype == FLOAT8_E4M3 else (2, -14)
        exponent = np.maximum(np.frexp(values)[1] - 1, smallest)
        rounded = np.ldexp(np.rint(np.ldexp(values, mantissa_bits - exponent)), exponent - mantissa_bits)
        if (
            dtype == FLOAT8_E4M3
        ):  # no infinity: it saturates. Its bits are float16's, but for the exponent's bias
            rounded = np.ldexp(np.clip(rounded, -448, 448), -8)
        half = rounded.astype(np.float16).view(np.uint16)
    bits = half >> 8 & 0x80 | half >> 7 & 0x7F if dtype == FLOAT8_E4M3 else half >> 8
    return np.where(nan, 0x7F, bits).astype(np.uint8).tobytes()


def decode_block_quantizer(body: bytes, numel: int, dtype: int, grid: list[Block]) -> bytes:
    """Section "Codec 2, block quantizer"."""
    reader = Reader(body)
    mode, zero = reader.integers(2, "u1").tolist()
    step_index = int(reader.integers(1, "i2")[0])
    tile, num_blocks, num_tiles, base, table_bytes, num_dropped = reader.integers(6, "u4").tolist()
    require(mode in (0, 1) and zero == 0 and -192 <= step_index <= 128, "an unknown mode or step")
    require(64 <= tile <= 65536 and tile & (tile - 1) == 0, "a tile is a power of two of blocks")
    require(
        num_blocks == len(grid) and num_tiles == -(-num_blocks // tile), "wrong number of blocks or tiles"
    )
    codes = reader.integers(num_blocks, "u1")
    reader.pad()
    coded = (codes > 0) & (codes < 255)
    require(base >= 3 and not (codes[coded] + base > 1007).any(), "a step out of range")
    require(num_dropped <= num_blocks, "more dropped blocks than there are")
    pairs = mode == 0
    table = read_only_table(reader, table_bytes, 122 if pairs else 256)
    directory = read_directory(reader, num_tiles, 2)
    require((table is not None) == any(info & 1 for _, info in directory), "table without use, or none")

    q = np.zeros(numel, np.int64)
    for t, (tile_bytes, info) in enumerate(directory):
        rows: list[Row] = []
        for i in range(t * tile, min((t + 1) * tile, num_blocks)):
            rows += block_rows(grid[i], pairs, table) if coded[i] else []
        read_integer_tile(reader, tile_bytes, info, rows, True, 2, q)
    reader.end()

    step = np.where(coded, (codes + base) << 21, 0).astype(np.uint32).view(np.float32)
    return dequantize(q, step, codes == 255, dtype, grid)


def read_integer_tile(
    reader: Reader, tile_bytes: int, info: int, rows: list[Row], carried: bool, width: int, q: Integers
) -> None:
    """A tile of the directory, which has 0 bytes and info 0 if it has no rows."""
    part = Reader(reader.take(tile_bytes))
    require(rows or info == 0, "a tile without rows has no info")
    if rows:
        decode_integer_tile(part, info, rows, carried, width, q)
    part.end()


def dequantize(
    q: Integers,
    steps: npt.NDArray[np.float32],
    non_finite: npt.NDArray[np.bool_],
    dtype: int,
    grid: list[Block],
) -> bytes:
    """float(q) · step of each block, NaN in non-finite ones (the end of "Symbols" of codec 2; "Codec 3")."""
    counts = [block.length for block in grid]
    product = q.astype(np.float32) * steps.repeat(counts)
    return round_to(np.where(non_finite.repeat(counts), np.float32("nan"), product), dtype)


def decode_grid_quantizer(body: bytes, numel: int, dtype: int, grid: list[Block]) -> bytes:
    """Section "Codec 3, grid quantizer"."""
    reader = Reader(body)
    step = np.frombuffer(reader.take(4), "<f4")
    require(2.0**-126 <= step[0] < 2.0**100, "a step out of range")
    q, classes = decode_classes_and_rows(reader, numel, grid, 2, 16)
    reader.end()
    return dequantize(q, step.repeat(len(grid)), classes == 16, dtype, grid)


def decode_delta(body: bytes, numel: int, dtype: int, grid: list[Block], reference: bytes) -> bytes:
    """Section "Codec 4, exact delta"."""
    reader = Reader(body)
    method, planes, zero = reader.take(1)[0], reader.take(1)[0], reader.integers(1, "u2")[0]
    require(method in (0, 1) and zero == 0, "an unknown method")
    if method == 1:
        require(planes == 0, "planes with method 1")
        return decode_lossless(body[4:], numel, dtype)
    item = ITEM_BYTES[dtype]
    require(planes <= {4: 2, 2: 1, 1: 0}[item], "too many planes")
    require(len(reference) == numel * item, "a reference of another size")
    q, _ = decode_classes_and_rows(reader, numel, grid, max(item, 2), 15)
    rest = np.zeros(numel, np.int64)
    for _ in range(planes):
        rest = rest << 8 | reader.integers(numel, "u1")
    reader.pad()
    reader.end()
    half = 1 << (8 * planes - 1) if planes else 0
    rest = ((rest + half) & ((1 << 8 * planes) - 1)) - half  # the remainder of rounding to nearest, signed

    def ordered(s: Integers) -> Integers:  # o(v); its own inverse
        return np.where(s >= 0, s, s ^ ((1 << (8 * item - 1)) - 1))

    order = reference_order(reference, item)
    distance = np.empty(numel, np.int64)
    distance[order] = (q << 8 * planes) + rest
    values = ordered(np.frombuffer(reference, f"<i{item}").astype(np.int64)) + distance
    return ordered(values.astype(f"<i{item}").astype(np.int64)).astype(f"<i{item}").tobytes()


def reference_order(reference: bytes, item: int) -> Integers:
    """Where the first, second, ... value of a delta's order lies: by the reference's exponent in runs of 65,536."""
    v = np.frombuffer(reference, f"<u{item}").astype(np.int64)
    key = {4: v >> 23 & 255, 2: v >> 7 & 255, 1: v & 127}[item]
    run = np.arange(v.size) // 65536
    return np.lexsort((np.arange(v.size), key, run))


def decode_classes_and_rows(
    reader: Reader, numel: int, grid: list[Block], width: int, last_class: int
) -> tuple[Integers, Integers]:
    """The integers of a tensor and the classes of its blocks ("Streams" of codecs 3 and 4)."""
    num_blocks, tile, num_tiles, class_bytes, tables_bytes = reader.integers(5, "u4").tolist()
    require(64 <= tile <= 2**20 and tile & (tile - 1) == 0, "a tile is a power of two of blocks")
    require(
        num_blocks == len(grid) and num_tiles == -(-num_blocks // tile), "wrong number of blocks or tiles"
    )
    classes = decode_class_stream(Reader(reader.take(class_bytes)), num_blocks)
    require(classes.max() <= last_class, "an unknown class")
    index = reader.integers(16, "u1").tolist()
    part, tables = Reader(reader.take(tables_bytes)), list[Table]()
    used = set(classes[(classes > 0) & (classes < 16)].tolist())
    table_of: dict[int, Table] = {}
    for c in range(16):
        if c not in used:
            require(index[c] == 255, "a table for a class that no block has")
            continue
        if index[c] == len(tables):
            tables.append(read_table(part, 122 if c <= 11 else 256))
        require(index[c] == len(tables) - 1, "the tables are not in order of their classes")
        table_of[c] = tables[-1]
        require(len(tables[-1].frequency) == (122 if c <= 11 else 256), "a table of pairs and of bytes")
    part.end()

    q = np.zeros(numel, np.int64)
    for t, (tile_bytes, info) in enumerate(read_directory(reader, num_tiles, 2)):
        rows: list[Row] = []
        for i in range(t * tile, min((t + 1) * tile, num_blocks)):
            c = int(classes[i])
            rows += block_rows(grid[i], c <= 11, table_of[c]) if 0 < c < 16 else []
        read_integer_tile(reader, tile_bytes, info, rows, False, width, q)
    return q, classes


def decode_class_stream(reader: Reader, num_blocks: int) -> Integers:
    """Section "Class stream" of codecs 3 and 4."""
    table_bytes = int(reader.integers(1, "u4")[0])
    if table_bytes == 0:
        classes = reader.integers(num_blocks, "u1")
        reader.pad()
    else:
        table = read_only_table(reader, table_bytes, 17)
        assert table is not None
        tiles = []
        for first in range(0, num_blocks, 256 * LANES):
            num_rows = min(256, -(-(num_blocks - first) // LANES))
            part = Reader(reader.take(int(reader.integers(1, "u4")[0])))
            symbols, carry = decode_rows(part, [table] * num_rows)
            require(not carry.any(), "a lane carries bits")
            part.end()
            tiles.append(symbols.reshape(-1).astype(np.int64))
        padded = np.concatenate(tiles)
        classes = padded[:num_blocks]
        require(not padded[num_blocks:].any(), "a class behind the last block")
    reader.end()
    return classes
