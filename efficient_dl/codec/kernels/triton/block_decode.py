"""Packets of the block quantizer to values on a GPU: one program a tile, from rANS rows straight to scaled stores.

Every size and offset that a packet names is checked or clamped before it is used; whatever does not fit sets the
status to WRONG_BODY, and nothing outside of the packet and the output is touched.
"""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# ruff: noqa: SIM102 (in Triton `and` evaluates both sides: a load behind a test needs a block of its own)
from __future__ import annotations

import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.block_encode import pad4
from efficient_dl.codec.kernels.triton.block_values import (
    BYTE_ESCAPE,
    BYTE_RADIUS,
    PAIR_ESCAPE,
    PAIR_RADIUS,
    PAIRS,
    block_places,
    step_of,
    store_values,
)
from efficient_dl.codec.kernels.triton.header import WRONG_BODY as _WRONG_BODY
from efficient_dl.codec.kernels.triton.rans import LANES, LOW, STATE_BYTES, decode_row
from efficient_dl.codec.kernels.triton.tables import parse_table

HEAD = tl.constexpr(60)  # bytes in front of the codes: the packet's header and the body's fields
WRONG_BODY = tl.constexpr(_WRONG_BODY)
PLAN = 6  # mode, T, tiles, base, where the directory and where the tiles begin


@triton.jit
def load_u32(pointer):
    """Unsigned 32 bits as int64. pointer: int32."""
    return tl.load(pointer).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit(do_not_specialize=["num_blocks"])
def open_kernel(packet_ptr, status_ptr, entries_ptr, offsets_ptr, plan_ptr, num_blocks, CHUNK: tl.constexpr):
    """One program: checks the fields in front of the tiles, reads the table, adds up the directory.

    packet_ptr: uint8. offsets_ptr: int64, room for a tile every 64 blocks. plan_ptr: int64 (PLAN,).
    """
    codes_end = HEAD + pad4(num_blocks).to(tl.int64)
    total = tl.load(status_ptr + 1)
    if tl.load(status_ptr) == 0:
        sound = codes_end <= total
        fields = packet_ptr.to(tl.pointer_type(tl.int32)) + 8
        if sound:
            head = tl.load(fields)
            T = load_u32(fields + 1)
            num_tiles = load_u32(fields + 3)
            base = load_u32(fields + 4)
            table_bytes = load_u32(fields + 5)
            mode = head & 0xFFFF
            index = head >> 16
            sound = (mode <= 1) & (index >= -192) & (index <= 128)
            sound = sound & (T >= 64) & (T <= 65536) & ((T & (T - 1)) == 0)
            sound = sound & (load_u32(fields + 2) == num_blocks) & (base >= 3) & (base < 1007)
            sound = sound & (load_u32(fields + 6) <= num_blocks)
            sound = sound & (num_tiles * T >= num_blocks) & ((num_tiles - 1) * T < num_blocks)
            tiles_begin = codes_end + table_bytes + 8 * num_tiles
            sound = sound & (tiles_begin <= total) & ((table_bytes & 3) == 0)
            for place in range(num_blocks, codes_end.to(tl.int32) - HEAD):
                sound = sound & (tl.load(packet_ptr + HEAD + place) == 0)
            if sound:
                if table_bytes > 0:
                    table_ptr = packet_ptr + codes_end
                    if mode == 0:
                        sound = parse_table(table_ptr, table_bytes.to(tl.int32), entries_ptr, 122)
                    else:
                        sound = parse_table(table_ptr, table_bytes.to(tl.int32), entries_ptr, 256)
                else:
                    tl.store(entries_ptr + tl.arange(0, 256), tl.zeros([256], tl.uint32))
                directory = (packet_ptr + codes_end + table_bytes).to(tl.pointer_type(tl.int32))
                used = tl.zeros([], tl.int64)
                num_coded = tl.zeros([], tl.int32)
                for first in range(0, num_tiles.to(tl.int32), CHUNK):
                    tile = first + tl.arange(0, CHUNK)
                    inside = tile < num_tiles
                    size = tl.load(directory + 2 * tile, mask=inside, other=0)
                    size = size.to(tl.uint32, bitcast=True).to(tl.int64)
                    num_coded += tl.sum(tl.load(directory + 2 * tile + 1, mask=inside, other=0) & 1, 0)
                    end = used + tl.cumsum(size, 0)
                    tl.store(offsets_ptr + tile, end - size, mask=inside)
                    used += tl.sum(size, 0)
                sound = sound & (tiles_begin + used == total) & ((num_coded > 0) == (table_bytes > 0))
            tl.store(plan_ptr, mode.to(tl.int64))
            tl.store(plan_ptr + 1, T)
            tl.store(plan_ptr + 2, num_tiles)
            tl.store(plan_ptr + 3, base)
            tl.store(plan_ptr + 4, codes_end + table_bytes)
            tl.store(plan_ptr + 5, tiles_begin)
        if sound == 0:
            tl.store(status_ptr, WRONG_BODY)


@triton.jit(do_not_specialize=["numel", "num_blocks"])
def list_kernel(
    packet_ptr,
    status_ptr,
    plan_ptr,
    starts_ptr,
    row_starts_ptr,
    row_shapes_ptr,
    tile_blocks_ptr,
    tile_values_ptr,
    numel,
    num_blocks,
    HAS_STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a tile: where the values of its coded blocks go, so that the decoder need not look for them.

    row_starts_ptr, row_shapes_ptr: int32 (num_blocks,), tile t's coded blocks from place t T on: their first values;
    their lengths | absolute codes << 16. tile_blocks_ptr, tile_values_ptr: int32, coded blocks and symbols if stored.
    """
    tile = tl.program_id(0)
    if tl.load(status_ptr) == 0:
        if tile < tl.load(plan_ptr + 2):
            pairs = tl.load(plan_ptr) == 0
            T = tl.load(plan_ptr + 1).to(tl.int32)
            base = tl.load(plan_ptr + 3).to(tl.int32)
            num_coded = tl.zeros([], tl.int32)
            num_values = tl.zeros([], tl.int32)
            wrong = tl.zeros([], tl.int32)
            for chunk in range(0, T, CHUNK):
                lane = tl.arange(0, CHUNK)
                block = tile * T + chunk + lane
                inside = (block < num_blocks) & (chunk + lane < T)
                sent = tl.load(packet_ptr + HEAD + block, mask=inside, other=0).to(tl.int32)
                coded = (sent > 0) & (sent < 255)
                present = coded.to(tl.int32)
                wrong += tl.sum((coded & (sent + base > 1007)).to(tl.int32), 0)
                start, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
                rank = tile * T + num_coded + tl.cumsum(present, 0) - 1
                tl.store(row_starts_ptr + rank, start, mask=coded)
                tl.store(row_shapes_ptr + rank, length | ((sent + base) << 16), mask=coded)
                num_coded += tl.sum(present, 0)
                values = tl.where(pairs, tl.minimum(length, LANES), length)
                num_values += tl.sum(tl.where(coded, values, 0), 0)
            tl.store(tile_blocks_ptr + tile, num_coded)
            tl.store(tile_values_ptr + tile, num_values)
            if wrong > 0:
                tl.store(status_ptr, WRONG_BODY)


@triton.jit
def load_escapes(escapes_ptr, rank, mask, num_escapes):
    """Escaped integers of 16 bits; 0 for those that the packet does not have."""
    return tl.load(escapes_ptr + rank, mask=mask & (rank < num_escapes), other=0).to(tl.int32)


@triton.jit
def store_row(
    out_ptr,
    symbol,
    start,
    shape,
    half,
    escapes_ptr,
    num_read,
    num_escapes,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One row of symbols to values; returns the escapes read so far and whether something was wrong (int32).

    start, shape: as in `list_kernel`. half: 0 or 1, which half of a block a row of single values is. num_read,
    num_escapes: in integers, two for each pair.
    """
    lane = tl.arange(0, LANES)
    length = shape & 0xFFFF
    step = step_of(shape >> 16)
    if MODE == PAIRS:
        escaped = symbol == PAIR_ESCAPE
        first = symbol // 11 - PAIR_RADIUS
        second = symbol % 11 - PAIR_RADIUS
        wrong = tl.max((symbol > PAIR_ESCAPE).to(tl.int32), 0)
        count = tl.sum(escaped.to(tl.int32), 0)
        if count > 0:
            rank = num_read + 2 * (tl.cumsum(escaped.to(tl.int32), 0) - 1)
            first = tl.where(escaped, load_escapes(escapes_ptr, rank, escaped, num_escapes), first)
            second = tl.where(escaped, load_escapes(escapes_ptr, rank + 1, escaped, num_escapes), second)
            num_read += 2 * count
        store_values(out_ptr, start + lane, first.to(tl.float32) * step, lane < length, DTYPE, ACCUMULATE)
        store_values(
            out_ptr,
            start + LANES + lane,
            second.to(tl.float32) * step,
            lane + LANES < length,
            DTYPE,
            ACCUMULATE,
        )
        if length < 256:
            behind = ((lane >= length) & (first != 0)) | ((lane + LANES >= length) & (second != 0))
            wrong = tl.maximum(wrong, tl.max(behind.to(tl.int32), 0))
    else:
        escaped = symbol == BYTE_ESCAPE
        value = symbol - BYTE_RADIUS
        wrong = tl.zeros([], tl.int32)
        count = tl.sum(escaped.to(tl.int32), 0)
        if count > 0:
            rank = num_read + tl.cumsum(escaped.to(tl.int32), 0) - 1
            value = tl.where(escaped, load_escapes(escapes_ptr, rank, escaped, num_escapes), value)
            num_read += count
        place = half * LANES + lane
        store_values(out_ptr, start + place, value.to(tl.float32) * step, place < length, DTYPE, ACCUMULATE)
        if length < 256:
            wrong = tl.max(((place >= length) & (value != 0)).to(tl.int32), 0)
    return num_read, wrong


@triton.jit
def decode_tile(
    packet_ptr,
    out_ptr,
    row_starts_ptr,
    row_shapes_ptr,
    slots_ptr,
    tile_blocks,
    tile_values,
    offset,
    size,
    info,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Decodes one tile, whose `size` bytes at `offset` lie in the packet; returns whether it was sound.

    row_starts_ptr, row_shapes_ptr: the tile's part of them. size: int64. info: int64, unsigned 32 bits.
    """
    ROWS: tl.constexpr = 1 if MODE == PAIRS else 2
    lane = tl.arange(0, LANES)
    num_rows = tile_blocks * ROWS
    num_escapes = info >> 1
    escape_bytes = pad4(num_escapes * (4 if MODE == PAIRS else 2))
    symbol_bytes = size - escape_bytes
    is_coded = (info & 1) != 0
    fits = tl.where(
        is_coded,
        (num_rows > 2) & (symbol_bytes >= STATE_BYTES),
        symbol_bytes == pad4(tile_values).to(tl.int64),
    )
    sound = fits & ((size & 3) == 0)
    if sound:
        tile_ptr = packet_ptr + offset
        escapes_ptr = (tile_ptr + symbol_bytes).to(tl.pointer_type(tl.int16))
        # At most as many as the tile has values: `fits` leaves less than 2^31 bytes to be told apart.
        num_integers = (num_escapes * (2 if MODE == PAIRS else 1)).to(tl.int32)
        num_read = tl.zeros([], tl.int32)
        wrong = tl.zeros([], tl.int32)
        if is_coded:
            state = tl.load(tile_ptr.to(tl.pointer_type(tl.uint32)) + lane)
            words_ptr = (tile_ptr + STATE_BYTES).to(tl.pointer_type(tl.uint16))
            num_words = ((symbol_bytes - STATE_BYTES) // 2).to(tl.int32)
            position = tl.zeros([], tl.int32)
            # The next row's place is fetched while this one is decoded.
            start = tl.load(row_starts_ptr)
            shape = tl.load(row_shapes_ptr)
            for row in range(0, num_rows - 2):
                next_rank = tl.minimum((row + 1) // ROWS, tile_blocks - 1)
                next_start = tl.load(row_starts_ptr + next_rank)
                next_shape = tl.load(row_shapes_ptr + next_rank)
                state, symbol, position = decode_row(state, slots_ptr, words_ptr, position, num_words)
                num_read, bad = store_row(
                    out_ptr,
                    symbol,
                    start,
                    shape,
                    row % ROWS,
                    escapes_ptr,
                    num_read,
                    num_integers,
                    MODE,
                    DTYPE,
                    ACCUMULATE,
                )
                wrong = tl.maximum(wrong, bad)
                start = next_start
                shape = next_shape
            carry = (state - LOW).to(tl.int32, bitcast=True)
            wrong = tl.maximum(wrong, tl.max(((carry < 0) | (carry >= LOW)).to(tl.int32), 0))
            if position + (position & 1) != num_words:
                wrong += 1
            else:
                if position < num_words:
                    wrong = tl.maximum(wrong, (tl.load(words_ptr + position) != 0).to(tl.int32))
            for last in tl.static_range(2):
                row = num_rows - 2 + last
                num_read, bad = store_row(
                    out_ptr,
                    (carry >> (8 * last)) & 255,
                    tl.load(row_starts_ptr + row // ROWS),
                    tl.load(row_shapes_ptr + row // ROWS),
                    row % ROWS,
                    escapes_ptr,
                    num_read,
                    num_integers,
                    MODE,
                    DTYPE,
                    ACCUMULATE,
                )
                wrong = tl.maximum(wrong, bad)
        else:
            done = tl.zeros([], tl.int32)
            zero = 60 if MODE == PAIRS else 127
            for row in range(0, num_rows):
                shape = tl.load(row_shapes_ptr + row // ROWS)
                half = row % ROWS
                lanes = tl.minimum(tl.maximum((shape & 0xFFFF) - half * LANES, 0), LANES)
                symbol = tl.load(tile_ptr + done + lane, mask=lane < lanes, other=zero).to(tl.int32)
                num_read, bad = store_row(
                    out_ptr,
                    symbol,
                    tl.load(row_starts_ptr + row // ROWS),
                    shape,
                    half,
                    escapes_ptr,
                    num_read,
                    num_integers,
                    MODE,
                    DTYPE,
                    ACCUMULATE,
                )
                wrong = tl.maximum(wrong, bad)
                done += lanes
            pad = done + tl.arange(0, 4)
            rest = tl.load(tile_ptr + pad, mask=pad < pad4(done), other=0).to(tl.int32)
            wrong = tl.maximum(wrong, tl.max(rest, 0))
        if MODE != PAIRS:
            if (num_integers & 1) != 0:
                wrong = tl.maximum(wrong, (tl.load(escapes_ptr + num_integers) != 0).to(tl.int32))
        sound = (wrong == 0) & (num_read == num_integers)
    return sound


@triton.jit
def decode_kernel(
    packet_ptr,
    status_ptr,
    plan_ptr,
    slots_ptr,
    offsets_ptr,
    row_starts_ptr,
    row_shapes_ptr,
    tile_blocks_ptr,
    tile_values_ptr,
    out_ptr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program a tile; programs behind the last tile have nothing to do. packet_ptr: uint8, 4-byte aligned."""
    tile = tl.program_id(0)
    if tl.load(status_ptr) == 0:
        if tile < tl.load(plan_ptr + 2):
            entry_ptr = (packet_ptr + tl.load(plan_ptr + 4)).to(tl.pointer_type(tl.int32)) + 2 * tile
            offset = tl.load(plan_ptr + 5) + tl.load(offsets_ptr + tile)
            size = load_u32(entry_ptr)
            info = load_u32(entry_ptr + 1)
            first = tile * tl.load(plan_ptr + 1).to(tl.int32)
            tile_blocks = tl.load(tile_blocks_ptr + tile)
            tile_values = tl.load(tile_values_ptr + tile)
            if tl.load(plan_ptr) == 0:
                sound = decode_tile(
                    packet_ptr,
                    out_ptr,
                    row_starts_ptr + first,
                    row_shapes_ptr + first,
                    slots_ptr,
                    tile_blocks,
                    tile_values,
                    offset,
                    size,
                    info,
                    0,
                    DTYPE,
                    ACCUMULATE,
                )
            else:
                sound = decode_tile(
                    packet_ptr,
                    out_ptr,
                    row_starts_ptr + first,
                    row_shapes_ptr + first,
                    slots_ptr,
                    tile_blocks,
                    tile_values,
                    offset,
                    size,
                    info,
                    1,
                    DTYPE,
                    ACCUMULATE,
                )
            if sound == 0:
                tl.store(status_ptr, WRONG_BODY)


@triton.jit(do_not_specialize=["numel", "num_blocks"])
def fill_kernel(
    packet_ptr,
    status_ptr,
    starts_ptr,
    out_ptr,
    numel,
    num_blocks,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """The blocks without rows: zeros, or NaN for those that held a value that was not finite."""
    if tl.load(status_ptr) == 0:
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        sent = tl.load(packet_ptr + HEAD + block, mask=block < num_blocks, other=1).to(tl.int32)
        plain = ((sent == 0) | (sent == 255)).to(tl.int32)
        if tl.max(plain, 0) > 0:
            start, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
            length = tl.where(plain != 0, length, 0)
            lane = tl.arange(0, 256)[None, :]
            value = tl.where(sent == 255, 0x7FC00000, 0).to(tl.float32, bitcast=True)
            value = tl.broadcast_to(value[:, None], (BLOCKS, 256))
            place = start[:, None] + lane
            store_values(out_ptr, place, value, lane < length[:, None], DTYPE, ACCUMULATE)
