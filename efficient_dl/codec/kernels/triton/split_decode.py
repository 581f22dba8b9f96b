"""The exact codec's decoding kernels: open the packet, decode the symbols, merge the planes (docs/format.md, codec 1).

Whatever the bytes say, nothing is read or written out of bounds: sizes are checked before they are used, a tile that is
not what its directory entry says is left out, and every fault is noted in the status, which the host reads at the end.

Tiles of 16-bit values without escapes need no merging: their values are put together as their symbols are decoded.
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Kernels take numbers where they say tl.constexpr, and tl.static_range is no iterator.)
from __future__ import annotations

import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.header import WRONG_BODY as _WRONG_BODY
from efficient_dl.codec.kernels.triton.rans import LANES, LOW, STATE_BYTES, decode_ranked_row, decode_row
from efficient_dl.codec.kernels.triton.split_codes import (
    HEAD_BYTES,
    codes_are_sound,
    head_is_sound,
    load_code,
    load_codes,
    section_bytes,
)
from efficient_dl.codec.kernels.triton.split_values import (
    BLOCK_VALUES,
    ESCAPE,
    ESCAPES_SHIFT,
    FLOAT32,
    MODES_SHIFT,
    TILE_BLOCKS,
    TILE_VALUES,
    from_float,
    join,
    load_bits,
    place_blocks,
    to_float,
    typed,
)
from efficient_dl.codec.kernels.triton.tables import parse_table

WRONG_BODY = tl.constexpr(_WRONG_BODY)

# What a tile turned out to be.
ZEROS = tl.constexpr(0)
STORED = tl.constexpr(1)
CODED = tl.constexpr(2)
REFUSED = tl.constexpr(3)
WRITTEN = tl.constexpr(4)  # coded, and its values are in the output

HEADER_BYTES = tl.constexpr(32)
TABLE_AT = tl.constexpr(40)
_TABLE_BYTES = tl.constexpr(416)


@triton.jit
def open_kernel(packet_ptr, status_ptr, entries_ptr, offsets_ptr, place_ptr, num_tiles, CHUNK: tl.constexpr):
    """Reads the table and the sizes of the tiles; one program.

    packet_ptr: uint8, at a multiple of 4 bytes. status_ptr: int64 (3,): error, the packet's bytes, its flags.
    offsets_ptr: int64 (num_tiles,), relative to the first tile. place_ptr: int64 (1,), becomes the first tile's place
    in the packet, or -1 if something is wrong already: no other kernel then does anything.
    """
    tl.store(place_ptr, tl.full([], -1, tl.int64))
    packet_bytes = tl.load(status_ptr + 1)
    room = packet_bytes - TABLE_AT - 12 * num_tiles
    if tl.load(status_ptr) == 0:
        sound = room >= 0
        if sound:
            head_ptr = packet_ptr.to(tl.pointer_type(tl.int32))
            sound = tl.load(head_ptr + HEADER_BYTES // 4) == num_tiles
            table_bytes = tl.load(head_ptr + HEADER_BYTES // 4 + 1)
            largest = tl.minimum(room, _TABLE_BYTES)
            fits = (table_bytes >= 0) & (table_bytes <= largest) & ((table_bytes & 3) == 0)
            table_bytes = tl.where(fits, table_bytes, 0)
            is_valid = parse_table(packet_ptr + TABLE_AT, table_bytes, entries_ptr, 256)
            sound = sound & fits & (is_valid | (table_bytes == 0))

            directory_ptr = head_ptr + (TABLE_AT + table_bytes) // 4
            total = tl.zeros([], tl.int64)
            misaligned = tl.zeros([], tl.int32)
            num_coded = tl.zeros([], tl.int32)
            for first in range(0, num_tiles, CHUNK):
                tile = first + tl.arange(0, CHUNK)
                mask = tile < num_tiles
                size = tl.load(directory_ptr + 3 * tile, mask=mask, other=0)
                misaligned |= tl.max(size & 3, 0)
                # As unsigned numbers, whose sum has room in 64 bits.
                size = size.to(tl.uint32, bitcast=True).to(tl.int64)
                tl.store(offsets_ptr + tile, total + tl.cumsum(size, 0) - size, mask=mask)
                total += tl.sum(size, 0)
                num_coded += tl.sum(tl.load(directory_ptr + 3 * tile + 2, mask=mask, other=0) & 1, 0)
            tiles_at = (table_bytes + TABLE_AT).to(tl.int64) + 12 * num_tiles
            sound = sound & (tiles_at + total == packet_bytes) & (misaligned == 0)
            # A table without a coded tile, or the other way round.
            sound = sound & ((table_bytes > 0) == (num_coded > 0))
            tl.store(place_ptr, tl.where(sound, tiles_at, -1))
        _note(status_ptr, sound)


@triton.jit
def decode_kernel(
    packet_ptr, out_ptr, slots_ptr, offsets_ptr, place_ptr, symbols_ptr, carried_ptr, starts_ptr, counts_ptr, kinds_ptr,
    status_ptr, numel, num_blocks, num_tiles, WIDTH: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Decodes a tile's symbols and finds out where its other bytes are; one program a tile.

    symbols_ptr: uint8, 256 a block. carried_ptr: uint8, 256 a tile: plane 0 of its last block with rows. starts_ptr:
    int32, for each plane and for the escapes num_blocks: where the block's bytes begin in the tile, -1 if there are
    none. counts_ptr: int32, for each block: values with bytes in the planes | escapes << 16. kinds_ptr: int32, one a
    tile. FUSED, for 16-bit values that are decoded to their own dtype: tiles without escapes, which are most, are
    written to out_ptr, int16, at once; the other pointers' room is then not touched.
    """
    tile = tl.program_id(0)
    tiles_at = tl.load(place_ptr)
    if tiles_at >= 0:
        first = tile * TILE_BLOCKS
        member = tl.arange(0, TILE_BLOCKS)
        inside = first + member < num_blocks
        remaining = tl.minimum(numel - tile.to(tl.int64) * TILE_VALUES, TILE_VALUES).to(tl.int32)
        entry_ptr = (packet_ptr + (tiles_at - 12 * (num_tiles - tile))).to(tl.pointer_type(tl.int32))
        tile_bytes = tl.load(entry_ptr)
        num_words = tl.load(entry_ptr + 1)
        info = tl.load(entry_ptr + 2)
        tile_ptr = packet_ptr + tiles_at + tl.load(offsets_ptr + tile)

        kind = tl.where((info & 1) != 0, CODED, tl.where(tile_bytes == 0, ZEROS, STORED))
        if kind == CODED:
            head = tl.load(tile_ptr.to(tl.pointer_type(tl.int32)), mask=tile_bytes >= HEAD_BYTES, other=0)
            sound = head_is_sound(head)
            count = tl.minimum(num_blocks - first, TILE_BLOCKS)
            states_at = section_bytes(tl.where(sound, head, 0), count)
            sound = sound & (tile_bytes >= states_at + STATE_BYTES)
            code = load_codes(tile_ptr, head, member, member < tl.where(sound, count, 0))
            present = (code > 0).to(tl.int32)
            rows = 2 * tl.sum(present, 0) - (2 if WIDTH == 1 else 0)
            if sound:
                sound = codes_are_sound(tile_ptr, head, code, count)
            if WIDTH == 1:
                sound = sound & (tl.max(code, 0) <= 1)
            # Bits of info that mean nothing: only float32 has modes, and float8 no escapes.
            unknown: tl.constexpr = -2 if WIDTH == 1 else (0xFFE if WIDTH == 2 else 0x0FE)
            modes = info >> MODES_SHIFT
            sound = (
                sound & ((info & unknown) == 0) & (rows > 0) & (num_words >= 0) & (num_words <= rows * LANES)
            )
            sound = sound & ((modes & 3) != 3) & (((modes >> 2) & 3) != 3)
            sound = sound & (tile_bytes >= states_at + STATE_BYTES + (num_words + 1) // 2 * 4)
            if FUSED:
                kind = tl.where((info >> ESCAPES_SHIFT) == 0, WRITTEN, CODED)
                if sound & (kind == WRITTEN):
                    sound = _decode_values(
                        tile_ptr, tile_bytes, num_words, head, states_at, tl.max(tl.where(present > 0, member, -1), 0),
                        slots_ptr, out_ptr + tile.to(tl.int64) * TILE_VALUES, remaining,
                    )  # fmt: skip
            if sound & (kind == CODED):
                sound = _decode_tile(
                    tile_ptr, tile_bytes, num_words, info, head, states_at, present, inside, slots_ptr,
                    symbols_ptr + first.to(tl.int64) * BLOCK_VALUES, carried_ptr + tile * BLOCK_VALUES,
                    starts_ptr + first, counts_ptr + first, num_blocks, WIDTH,
                )  # fmt: skip
        else:
            used = tl.where(kind == STORED, remaining * WIDTH, 0)
            sound = (info == 0) & (num_words == 0) & (tile_bytes == (used + 3) // 4 * 4)
            if sound:
                sound = _is_zero(tile_ptr, used, tile_bytes)
        tl.store(kinds_ptr + tile, tl.where(sound, kind, REFUSED))
        _note(status_ptr, sound)


@triton.jit
def _decode_tile(
    tile_ptr, tile_bytes, num_words, info, head, states_at, present, inside, slots_ptr, symbols_ptr, carried_ptr,
    starts_ptr, counts_ptr, num_blocks, WIDTH: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    member = tl.arange(0, TILE_BLOCKS)
    last = tl.max(tl.where(present > 0, member, -1), 0)
    words_at = states_at + STATE_BYTES
    state = tl.load((tile_ptr + states_at).to(tl.pointer_type(tl.uint32)) + lane)
    words_ptr = (tile_ptr + words_at).to(tl.pointer_type(tl.uint16))
    position = tl.zeros([], tl.int32)
    counts = tl.zeros([TILE_BLOCKS], tl.int32)
    front = tl.zeros([LANES], tl.int32)
    back = tl.zeros([LANES], tl.int32)
    next_code = load_code(tile_ptr, head, 0)
    for block in range(0, last + (0 if WIDTH == 1 else 1)):
        code = next_code
        next_code = load_code(tile_ptr, head, tl.minimum(block + 1, last))
        if code > 0:
            state, front, position = decode_row(state, slots_ptr, words_ptr, position, num_words)
            state, back, position = decode_row(state, slots_ptr, words_ptr, position, num_words)
            tl.store(symbols_ptr + block * BLOCK_VALUES + lane, front.to(tl.uint8))
            tl.store(symbols_ptr + block * BLOCK_VALUES + LANES + lane, back.to(tl.uint8))
            if WIDTH > 1:
                # Values with bytes in the planes, and escapes above them, in one sum.
                both = tl.where(front == ESCAPE, 65536, tl.where(front == 0, 0, 1))
                both += tl.where(back == ESCAPE, 65536, tl.where(back == 0, 0, 1))
                counts = tl.where(member == block, tl.sum(both, 0), counts)

    carry = state - LOW
    sound = (position == num_words) & (tl.max((carry >> 16).to(tl.int32), 0) == 0)
    carry = carry.to(tl.int32)
    low = carry & 255
    high = (carry >> 8) & 255
    used = words_at + 2 * num_words
    sound = sound & _is_zero(tile_ptr, used, (used + 3) // 4 * 4)
    used = (used + 3) // 4 * 4
    if WIDTH == 1:
        tl.store(symbols_ptr + last * BLOCK_VALUES + lane, low.to(tl.uint8))
        tl.store(symbols_ptr + last * BLOCK_VALUES + LANES + lane, high.to(tl.uint8))
    else:
        tl.store(carried_ptr + lane, low.to(tl.uint8))
        tl.store(carried_ptr + LANES + lane, high.to(tl.uint8))
        stray = tl.where((front == 0) | (front == ESCAPE), low, 0)
        stray |= tl.where((back == 0) | (back == ESCAPE), high, 0)
        sound = sound & (tl.max(stray, 0) == 0)
        tl.store(counts_ptr + member, counts, mask=inside)
        kept = counts & 0xFFFF
        escaped = counts >> 16
        used = place_blocks(starts_ptr, tl.where(member == last, 0, kept), used, inside, 1)
        for plane in tl.static_range(2 if WIDTH == 4 else 0):
            mode = (info >> (MODES_SHIFT + 2 * plane)) & 3
            sent = tl.where(mode == 1, kept, 0)
            if mode == 2:
                num_present = tl.sum(present, 0)
                rank = tl.cumsum(present, 0) - present
                mask = (present > 0) & (used + (rank >> 3) < tile_bytes)
                byte = tl.load(tile_ptr + used + (rank >> 3), mask=mask, other=0).to(tl.int32)
                sent = tl.where(((byte >> (rank & 7)) & 1) != 0, kept, 0)
                # Bits behind the last block's: its byte holds them.
                behind = tl.where(member == last, byte >> ((rank & 7) + 1), 0)
                sound = sound & (tl.max(behind, 0) == 0)
                used += (num_present + 7) // 8
            used = place_blocks(starts_ptr + (1 + plane) * num_blocks, sent, used, inside, 1)
        planes: tl.constexpr = 3 if WIDTH == 4 else 1
        num_escapes = tl.sum(escaped, 0)
        sound = sound & (num_escapes == ((info >> ESCAPES_SHIFT) & 0xFFFFF))
        used = place_blocks(starts_ptr + planes * num_blocks, escaped, used, inside, WIDTH)
    sound = sound & ((used + 3) // 4 * 4 == tile_bytes)
    if sound:
        sound = _is_zero(tile_ptr, used, tile_bytes)
    return sound


@triton.jit
def _decode_values(
    tile_ptr, tile_bytes, num_words, head, states_at, last, slots_ptr, out_ptr, remaining
):  # fmt: skip
    """Writes a tile of 16-bit values that has no escapes; returns whether it was sound.

    last: the tile's last block with rows, whose bytes of plane 0 travel in the states. A value's byte is found by its
    rank among the values other than zero, counted from the tile's beginning.
    """
    lane = tl.arange(0, LANES)
    words_at = states_at + STATE_BYTES
    used = words_at + (num_words + 1) // 2 * 4
    state = tl.load((tile_ptr + states_at).to(tl.pointer_type(tl.uint32)) + lane)
    words_ptr = (tile_ptr + words_at).to(tl.pointer_type(tl.uint16))
    position = tl.zeros([], tl.int32)
    plane_at = used
    largest = tl.zeros([LANES], tl.int32)
    faults = tl.zeros([LANES], tl.int32)
    next_code = load_code(tile_ptr, head, 0)
    for block in range(0, last):
        code = next_code
        next_code = load_code(tile_ptr, head, block + 1)
        for half in tl.static_range(2):
            bits = tl.zeros([LANES], tl.int32)
            if code > 0:
                state, symbol, position, rank, count = decode_ranked_row(
                    state, slots_ptr, words_ptr, position, num_words
                )
                byte_at = plane_at + rank
                top = tl.load(tile_ptr + byte_at, mask=byte_at < tile_bytes, other=0).to(tl.int32)
                bits = join(symbol, code, top, 0, 2)
                largest = tl.maximum(largest, symbol)
                plane_at += count
            at = lane + block * BLOCK_VALUES + half * LANES
            faults |= _store_row(out_ptr, at, bits, remaining)

    state, front, position = decode_row(state, slots_ptr, words_ptr, position, num_words)
    state, back, position = decode_row(state, slots_ptr, words_ptr, position, num_words)
    carry = state - LOW
    faults |= (carry >> 16).to(tl.int32)
    carry = carry.to(tl.int32)
    low = carry & 255
    high = (carry >> 8) & 255
    # No escape was announced, and a zero has no byte in the states.
    largest = tl.maximum(largest, tl.maximum(front, back))
    faults |= (largest == ESCAPE).to(tl.int32) | tl.where(front == 0, low, 0) | tl.where(back == 0, high, 0)
    at = lane + last * BLOCK_VALUES
    faults |= _store_row(out_ptr, at, join(front, next_code, low, 0, 2), remaining)
    faults |= _store_row(out_ptr, at + LANES, join(back, next_code, high, 0, 2), remaining)
    for row in range(2 * (last + 1), (remaining + LANES - 1) // LANES):
        _store_row(out_ptr, lane + row * LANES, tl.zeros([LANES], tl.int32), remaining)

    sound = (position == num_words) & (tl.max((faults != 0).to(tl.int32), 0) == 0)
    sound = sound & _is_zero(tile_ptr, words_at + 2 * num_words, used)
    sound = sound & ((plane_at + 3) // 4 * 4 == tile_bytes)
    if sound:
        sound = _is_zero(tile_ptr, plane_at, tile_bytes)
    return sound


@triton.jit
def _store_row(out_ptr, at, bits, remaining):
    """Stores the bits of a row of 16-bit values; returns those that lie behind the tensor's end, int32 (128,).

    Without a mask a thread stores its values with one instruction.
    """
    if remaining == TILE_VALUES:
        tl.store(out_ptr + at, bits.to(tl.int16))
        behind = tl.zeros_like(bits)
    else:
        tl.store(out_ptr + at, bits.to(tl.int16), mask=at < remaining)
        behind = tl.where(at < remaining, 0, bits)
    return behind


@triton.jit
def _is_zero(bytes_ptr, first, end):
    """Whether the bytes from first up to end, at most 4, are zero."""
    at = first + tl.arange(0, 4)
    value = tl.load(bytes_ptr + at, mask=at < end, other=0).to(tl.int32)
    return tl.max(value, 0) == 0


@triton.jit
def _note(status_ptr, sound):
    tl.atomic_or(status_ptr, tl.full([], WRONG_BODY, tl.int64), mask=sound == 0)


@triton.jit
def merge_kernel(
    packet_ptr, out_ptr, offsets_ptr, place_ptr, symbols_ptr, carried_ptr, starts_ptr, counts_ptr, kinds_ptr,
    status_ptr, numel, num_blocks,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr, ACCUMULATE: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes values, or adds them; grid (num_tiles, PARTS). out_ptr: the output's bits, int32, int16 or uint8."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_at = tl.load(place_ptr)
    if tiles_at >= 0:
        kind = tl.load(kinds_ptr + tile)
        if (kind != REFUSED) & (kind != WRITTEN):
            tile_ptr = packet_ptr + tiles_at + tl.load(offsets_ptr + tile)
            out_ptr += tile.to(tl.int64) * TILE_VALUES
            remaining = tl.minimum(numel - tile.to(tl.int64) * TILE_VALUES, TILE_VALUES).to(tl.int32)
            part_blocks: tl.constexpr = TILE_BLOCKS // PARTS
            for group in range(part * part_blocks, (part + 1) * part_blocks, GROUP):
                member = group + tl.arange(0, GROUP)
                index = member[:, None] * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)[None, :]
                bits = tl.zeros([GROUP, BLOCK_VALUES], tl.int32)
                if kind == STORED:
                    bits = load_bits(typed(tile_ptr, WIDTH), index, index < remaining, WIDTH)
                if kind == CODED:
                    bits = _merge_blocks(
                        tile_ptr, symbols_ptr, carried_ptr, starts_ptr, counts_ptr, tile, member, num_blocks, WIDTH,
                    )  # fmt: skip
                    behind = tl.where(index < remaining, 0, bits)
                    _note(status_ptr, tl.max(tl.max((behind != 0).to(tl.int32), 1), 0) == 0)
                if DTYPE != OUT_DTYPE or ACCUMULATE:
                    value = to_float(bits, DTYPE)
                    if ACCUMULATE:
                        out_width: tl.constexpr = 4 if OUT_DTYPE == FLOAT32 else WIDTH
                        before = load_bits(out_ptr, index, index < remaining, out_width)
                        value = to_float(before, OUT_DTYPE) + value
                    bits = from_float(value, OUT_DTYPE)
                tl.store(out_ptr + index, bits.to(out_ptr.dtype.element_ty), mask=index < remaining)


@triton.jit
def _merge_blocks(
    tile_ptr, symbols_ptr, carried_ptr, starts_ptr, counts_ptr, tile, member, num_blocks, WIDTH: tl.constexpr
):  # fmt: skip
    """The bits of some blocks of a coded tile, int32 (blocks, 256)."""
    block = tile * TILE_BLOCKS + member
    inside = block < num_blocks
    value = tl.arange(0, BLOCK_VALUES)[None, :]
    code = load_codes(tile_ptr, tl.load(tile_ptr.to(tl.pointer_type(tl.int32))), member, inside)
    present = (code > 0)[:, None]
    symbol_at = block.to(tl.int64)[:, None] * BLOCK_VALUES + value
    symbol = tl.load(symbols_ptr + symbol_at, mask=present & (symbol_at >= 0), other=0).to(tl.int32)
    bits = symbol
    if WIDTH > 1:
        planes: tl.constexpr = 3 if WIDTH == 4 else 1
        is_escaped = symbol == ESCAPE
        is_kept = (symbol != 0) & (symbol != ESCAPE)
        low = tl.zeros_like(symbol)
        start = tl.load(starts_ptr + block, mask=inside, other=-1)
        count = tl.load(counts_ptr + block, mask=inside, other=0)
        is_run = tl.min((count == BLOCK_VALUES).to(tl.int32), 0) != 0
        if is_run & (tl.min(start, 0) >= 0):
            # Mostly all values have bytes in the planes: a block's are one run.
            top = tl.load(tile_ptr + (start[:, None] + value)).to(tl.int32)
            for plane in tl.static_range(1, planes):
                start = tl.load(starts_ptr + plane * num_blocks + block, mask=inside, other=-1)
                mask = tl.broadcast_to((start >= 0)[:, None], symbol.shape)
                byte = tl.load(tile_ptr + (start[:, None] + value), mask=mask, other=0).to(tl.int32)
                low |= byte << (16 - 8 * plane)
            bits = join(symbol, code[:, None], top, low, WIDTH)
        else:
            both = is_kept.to(tl.int32) | (is_escaped.to(tl.int32) << 16)
            both = tl.cumsum(both, 1) - both
            rank = both & 0xFFFF
            is_sent = is_kept & (start >= 0)[:, None]
            top = tl.load(tile_ptr + start[:, None] + rank, mask=is_sent, other=0).to(tl.int32)
            # Only the last block's values have a symbol and no byte in plane 0.
            carried_at = tl.broadcast_to(tile * BLOCK_VALUES + value, symbol.shape)
            top |= tl.load(carried_ptr + carried_at, mask=is_kept & ~is_sent, other=0).to(tl.int32)
            for plane in tl.static_range(1, planes):
                start = tl.load(starts_ptr + plane * num_blocks + block, mask=inside, other=-1)
                is_sent = is_kept & (start >= 0)[:, None]
                byte = tl.load(tile_ptr + start[:, None] + rank, mask=is_sent, other=0).to(tl.int32)
                low |= byte << (16 - 8 * plane)
            bits = join(symbol, code[:, None], top, low, WIDTH)
            start = tl.load(starts_ptr + planes * num_blocks + block, mask=inside, other=-1)
            if tl.max(start, 0) >= 0:
                bits = tl.where(is_escaped, 0, bits)
                for i in tl.static_range(WIDTH):
                    at = start[:, None] + (both >> 16) * WIDTH + i
                    escape = tl.load(tile_ptr + at, mask=is_escaped & (start >= 0)[:, None], other=0)
                    bits |= escape.to(tl.int32) << (8 * i)
    return bits
