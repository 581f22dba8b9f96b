"""The tiles of the block quantizer on a GPU: coded into slots of their own, sized up, and put into the packet."""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.block_quantize import return_block
from efficient_dl.codec.kernels.triton.block_values import PAIRS, block_places
from efficient_dl.codec.kernels.triton.compact import copy_integers, copy_words, scan_tiles
from efficient_dl.codec.kernels.triton.rans import LANES, LOW, STATE_BYTES, encode_row

HEADER = tl.constexpr(32)
HEAD = tl.constexpr(28)  # bytes of the body in front of the codes


@triton.jit
def pad4(num_bytes):
    """num_bytes, rounded up to a multiple of 4."""
    return (num_bytes + 3) // 4 * 4


@triton.jit
def row_place(order_ptr, tile, row, T: tl.constexpr, MODE: tl.constexpr):
    """Where the symbols of a tile's row begin, int64; of row 0 for rows in front of it."""
    row = tl.maximum(row, 0)
    if MODE == PAIRS:
        return tl.load(order_ptr + tile * T + row).to(tl.int64) * LANES
    block = tl.load(order_ptr + tile * T + (row >> 1)).to(tl.int64)
    return block * (2 * LANES) + (row & 1) * LANES


@triton.jit
def encode_kernel(
    symbols_ptr,
    order_ptr,
    entries_ptr,
    tile_blocks_ptr,
    tile_values_ptr,
    tile_escapes_ptr,
    words_ptr,
    states_ptr,
    cursors_ptr,
    sizes_ptr,
    infos_ptr,
    T: tl.constexpr,
    SLOT: tl.constexpr,
    MODE: tl.constexpr,
):
    """Codes one tile by one program. words_ptr: uint16 (tiles, SLOT), filled from the end; cursors_ptr: int32 (tiles,),
    the first word there is. states_ptr: uint32 (tiles, 128). sizes_ptr, infos_ptr: int32 (tiles,), the directory.

    SLOT holds as many words as a tile can have that is smaller coded than stored. The loads of a row are started while
    the rows behind it are coded: its place three rows ahead, its symbols two, their table entries one.
    """
    tile = tl.program_id(0)
    lane = tl.arange(0, LANES)
    num_rows = tl.load(tile_blocks_ptr + tile) * (1 if MODE == PAIRS else 2)
    escape_bytes = pad4(tl.load(tile_escapes_ptr + tile) * (4 if MODE == PAIRS else 2))
    stored_bytes = pad4(tl.load(tile_values_ptr + tile))
    words_ptr += tile.to(tl.int64) * SLOT
    cursor = tl.full([], SLOT, tl.int32)
    coded_bytes = tl.full([], 1 << 30, tl.int32)
    if num_rows > 2:
        place = row_place(order_ptr, tile, num_rows - 2, T, MODE)
        carry = tl.load(symbols_ptr + place + lane).to(tl.uint32)
        place = row_place(order_ptr, tile, num_rows - 1, T, MODE)
        state = LOW + (carry | (tl.load(symbols_ptr + place + lane).to(tl.uint32) << 8))
        place = row_place(order_ptr, tile, num_rows - 3, T, MODE)
        entry = tl.load(entries_ptr + tl.load(symbols_ptr + place + lane).to(tl.int32))
        place = row_place(order_ptr, tile, num_rows - 4, T, MODE)
        symbol = tl.load(symbols_ptr + place + lane).to(tl.int32)
        place = row_place(order_ptr, tile, num_rows - 5, T, MODE)
        for done in range(0, num_rows - 2):
            next_entry = tl.load(entries_ptr + symbol)
            symbol = tl.load(symbols_ptr + place + lane).to(tl.int32)
            place = row_place(order_ptr, tile, num_rows - 6 - done, T, MODE)
            state, cursor = encode_row(state, entry, words_ptr, cursor)
            entry = next_entry
        tl.store(states_ptr + tile * LANES + lane, state)
        coded_bytes = tl.where(cursor >= 0, pad4(STATE_BYTES + 2 * (SLOT - cursor)), coded_bytes)
    is_coded = coded_bytes < stored_bytes
    tl.store(cursors_ptr + tile, cursor)
    tl.store(sizes_ptr + tile, tl.where(is_coded, coded_bytes, stored_bytes) + escape_bytes)
    tl.store(infos_ptr + tile, (tl.load(tile_escapes_ptr + tile) << 1) | is_coded.to(tl.int32))


@triton.jit
def count_coded(infos_ptr, num_tiles, CHUNK: tl.constexpr):
    """How many of the first tiles are coded."""
    count = tl.zeros([], tl.int32)
    for first in range(0, num_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        count += tl.sum(tl.load(infos_ptr + tile, mask=tile < num_tiles, other=0) & 1, 0)
    return count


@triton.jit(do_not_specialize=["num_blocks", "num_tiles", "capacity"])
def plan_kernel(
    body_ptr,
    sizes_ptr,
    infos_ptr,
    tile_blocks_ptr,
    offsets_ptr,
    index_ptr,
    largest_code_ptr,
    table_bytes_ptr,
    plan_ptr,
    num_blocks,
    num_tiles,
    capacity,
    T: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: which tiles are kept, where they go, and the fields in front of the codes.

    body_ptr: int32. offsets_ptr: int64 (tiles,), relative to the first tile. plan_ptr: int64 (3,), becomes the kept
    tiles, the table's bytes and the body's bytes. capacity: int64 bytes, the header included.
    """
    front = HEAD + pad4(num_blocks).to(tl.int64) + 8 * num_tiles.to(tl.int64)
    table_bytes = tl.load(table_bytes_ptr)
    table_bytes = tl.where(count_coded(infos_ptr, num_tiles, CHUNK) > 0, table_bytes, 0)
    limit = capacity - HEADER - front - table_bytes
    kept, kept_bytes = scan_tiles(sizes_ptr, offsets_ptr, num_tiles, limit, CHUNK)
    num_dropped = tl.zeros([], tl.int32)
    if kept < num_tiles:
        table_bytes = tl.where(count_coded(infos_ptr, kept.to(tl.int32), CHUNK) > 0, table_bytes, 0)
        for first in range(0, num_tiles, CHUNK):
            tile = first + tl.arange(0, CHUNK)
            dropped = (tile >= kept) & (tile < num_tiles)
            num_dropped += tl.sum(tl.load(tile_blocks_ptr + tile, mask=dropped, other=0), 0)
    tl.store(plan_ptr, kept)
    tl.store(plan_ptr + 1, table_bytes.to(tl.int64))
    tl.store(plan_ptr + 2, front + table_bytes + kept_bytes)
    tl.store(body_ptr, MODE | (tl.load(index_ptr) << 16))
    tl.store(body_ptr + 1, T)
    tl.store(body_ptr + 2, num_blocks)
    tl.store(body_ptr + 3, num_tiles)
    tl.store(body_ptr + 4, tl.maximum(tl.load(largest_code_ptr) - 254, 3))
    tl.store(body_ptr + 5, table_bytes)
    tl.store(body_ptr + 6, num_dropped)


@triton.jit
def copy_escapes(
    target_ptr,
    escapes_ptr,
    order_ptr,
    escapes_before_ptr,
    tile,
    tile_blocks,
    num_escapes,
    part,
    T: tl.constexpr,
    LEVELS: tl.constexpr,
    MODE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Collects a tile's escapes from the rooms of its blocks, which each finds by halving. target_ptr: int16."""
    for first in range(part * BLOCK, num_escapes, PARTS * BLOCK):
        escape = first + tl.arange(0, BLOCK)
        mask = escape < num_escapes
        rank = tl.zeros([BLOCK], tl.int32)
        for level in tl.static_range(LEVELS):
            ahead = rank + ((T >> 1) >> level)
            before = tl.load(
                escapes_before_ptr + tile * T + ahead, mask=mask & (ahead < tile_blocks), other=0
            )
            rank = tl.where((ahead < tile_blocks) & (before <= escape), ahead, rank)
        block = tl.load(order_ptr + tile * T + rank, mask=mask, other=0)
        before = tl.load(escapes_before_ptr + tile * T + rank, mask=mask, other=0)
        if MODE == PAIRS:
            place = block.to(tl.int64) * 256 + 2 * (escape - before)
            tl.store(target_ptr + 2 * escape, tl.load(escapes_ptr + place, mask=mask, other=0), mask=mask)
            value = tl.load(escapes_ptr + place + 1, mask=mask, other=0)
            tl.store(target_ptr + 2 * escape + 1, value, mask=mask)
        else:
            place = block.to(tl.int64) * 256 + escape - before
            value = tl.load(escapes_ptr + place, mask=mask, other=0)
            # Behind an odd number of escapes one zero completes the four bytes.
            tl.store(target_ptr + escape, tl.where(mask, value, 0), mask=escape < (num_escapes + 1) // 2 * 2)


@triton.jit
def copy_stored_rows(
    target_ptr,
    symbols_ptr,
    order_ptr,
    starts_ptr,
    tile,
    tile_blocks,
    part,
    numel,
    num_blocks,
    T: tl.constexpr,
    MODE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Copies the symbols of a tile's rows, as many as they have lanes with values; pads to 4. target_ptr: uint8."""
    lane = tl.arange(0, 128 if MODE == PAIRS else 256)
    done = tl.zeros([], tl.int32)
    for rank in range(0, tile_blocks):
        block = tl.load(order_ptr + tile * T + rank)
        _, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
        if MODE == PAIRS:
            length = tl.minimum(length, LANES)
        if rank % PARTS == part:
            place = block.to(tl.int64) * (LANES if MODE == PAIRS else 2 * LANES) + lane
            tl.store(target_ptr + done + lane, tl.load(symbols_ptr + place), mask=lane < length)
        done += length
    if part == 0:
        pad = done + tl.arange(0, 4)
        tl.store(target_ptr + pad, tl.zeros([4], tl.uint8), mask=pad < pad4(done))


@triton.jit(do_not_specialize=["numel", "num_blocks", "num_tiles"])
def copy_kernel(
    body_ptr,
    residual_ptr,
    starts_ptr,
    symbols_ptr,
    escapes_ptr,
    codes_ptr,
    order_ptr,
    escapes_before_ptr,
    tile_blocks_ptr,
    words_ptr,
    states_ptr,
    cursors_ptr,
    sizes_ptr,
    infos_ptr,
    offsets_ptr,
    table_ptr,
    plan_ptr,
    numel,
    num_blocks,
    num_tiles,
    T: tl.constexpr,
    LEVELS: tl.constexpr,
    SLOT: tl.constexpr,
    MODE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts the table, the directory and the tiles where the plan says, PARTS programs a tile. body_ptr: uint8.

    Tiles that did not fit are taken back: their codes become 0, their integers return to the residual.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    kept = tl.load(plan_ptr)
    table_bytes = tl.load(plan_ptr + 1)
    front = HEAD + pad4(num_blocks).to(tl.int64)
    if tile == 0:
        table_target = (body_ptr + front).to(tl.pointer_type(tl.int32))
        copy_integers(table_target, table_ptr, (table_bytes // 4).to(tl.int32), part, PARTS, BLOCK)
    entry_ptr = (body_ptr + front + table_bytes + 8 * tile.to(tl.int64)).to(tl.pointer_type(tl.int32))
    info = tl.load(infos_ptr + tile)
    tile_blocks = tl.load(tile_blocks_ptr + tile)
    if tile < kept:
        if part == 0:
            tl.store(entry_ptr, tl.load(sizes_ptr + tile))
            tl.store(entry_ptr + 1, info)
        target = body_ptr + front + table_bytes + 8 * num_tiles.to(tl.int64) + tl.load(offsets_ptr + tile)
        if (info & 1) != 0:
            states = target.to(tl.pointer_type(tl.uint32))
            copy_integers(states, states_ptr + tile * LANES, 128, part, PARTS, 128)
            cursor = tl.load(cursors_ptr + tile)
            source = words_ptr + tile.to(tl.int64) * SLOT + cursor
            words_target = (target + STATE_BYTES).to(tl.pointer_type(tl.int32))
            copy_words(words_target, source, SLOT - cursor, part, PARTS, BLOCK)
        else:
            copy_stored_rows(
                target,
                symbols_ptr,
                order_ptr,
                starts_ptr,
                tile,
                tile_blocks,
                part,
                numel,
                num_blocks,
                T,
                MODE,
                HAS_STARTS,
                PARTS,
            )
        num_escapes = info >> 1
        escape_bytes = pad4(num_escapes * (4 if MODE == PAIRS else 2))
        escapes_target = (target + tl.load(sizes_ptr + tile) - escape_bytes).to(tl.pointer_type(tl.int16))
        copy_escapes(
            escapes_target,
            escapes_ptr,
            order_ptr,
            escapes_before_ptr,
            tile,
            tile_blocks,
            num_escapes,
            part,
            T,
            LEVELS,
            MODE,
            PARTS,
            BLOCK,
        )
    else:
        if part == 0:
            tl.store(entry_ptr, 0)
            tl.store(entry_ptr + 1, 0)
        for rank in range(part, tile_blocks, PARTS):
            block = tl.load(order_ptr + tile * T + rank)
            tl.store(body_ptr + HEAD + block, tl.zeros([], tl.uint8))
            if HAS_RESIDUAL:
                code = tl.load(codes_ptr + block).to(tl.int32)
                return_block(
                    residual_ptr,
                    starts_ptr,
                    symbols_ptr,
                    escapes_ptr,
                    block,
                    code,
                    numel,
                    num_blocks,
                    MODE,
                    HAS_STARTS,
                )
