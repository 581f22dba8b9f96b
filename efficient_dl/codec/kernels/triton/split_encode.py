"""The exact codec's encoding kernels: measure, code the symbols, lay out, place (docs/format.md, codec 1).

Only the words of the tile coder need room of their own; all other bytes go from the tensor to their place in the
packet, which is known once every tile's words are counted. So the tensor is read three times, and copied nowhere twice.
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Kernels take numbers where they say tl.constexpr, and tl.static_range is no iterator.)
from __future__ import annotations

import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.compact import NO_LIMIT, copy_integers, copy_words, scan_tiles
from efficient_dl.codec.kernels.triton.rans import LANES, LOW, STATE_BYTES, encode_row
from efficient_dl.codec.kernels.triton.split_codes import choose_head, section_bytes, store_codes
from efficient_dl.codec.kernels.triton.split_values import (
    BLOCK_VALUES,
    ESCAPE,
    ESCAPES_SHIFT,
    MODES_SHIFT,
    TILE_BLOCKS,
    TILE_VALUES,
    exponents,
    load_bits,
    load_inside,
    place_blocks,
    plane_bytes,
    symbols,
    top_bytes,
    typed,
)
from efficient_dl.codec.kernels.triton.tables import TABLE_WORDS

# A block's record: bits 0-8 the values with bytes in the planes, 9-17 the escapes, 18 and 19 whether planes 1 and 2
# have a byte other than zero.
ESCAPED_SHIFT = tl.constexpr(9)
LOW_PLANES_SHIFT = tl.constexpr(18)
COUNT_MASK = tl.constexpr(511)
_COUNTS_MASK = tl.constexpr((1 << 18) - 1)
TABLE_AT = tl.constexpr(8)  # in the body
# A tile's record, int32 each.
NUM_WORDS = tl.constexpr(0)
INFO = tl.constexpr(1)
USED_BYTES = tl.constexpr(2)  # of a coded tile, without the padding
BITMAPS = tl.constexpr(3)  # and 4: where the bitmaps of planes 1 and 2 begin in the tile, -1 if there is none
HEAD = tl.constexpr(5)  # of its codes
_NO_LIMIT = tl.constexpr(NO_LIMIT)


@triton.jit
def sample_kernel(x_ptr, sample_ptr, numel, stride, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Adds the exponents of every stride-th block, and the number of its values that are not zeros, to int32 (2,)."""
    block = (tl.program_id(0) * GROUP + tl.arange(0, GROUP)).to(tl.int64) * stride
    index = block[:, None] * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)[None, :]
    bits = load_bits(x_ptr, index, index < numel, WIDTH)
    tl.atomic_add(sample_ptr, tl.sum(tl.sum(exponents(bits, WIDTH), 1), 0))
    tl.atomic_add(sample_ptr + 1, tl.sum(tl.sum((bits != 0).to(tl.int32), 1), 0))


@triton.jit
def measure_kernel(
    x_ptr, sample_ptr, codes_ptr, records_ptr, counts_ptr, numel, num_blocks,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Reference exponents, the blocks' records and the counts of the symbols; a program takes BLOCKS blocks.

    sample_ptr: int32 (2,) of `sample_kernel`. codes_ptr: uint8 (num_blocks,). records_ptr: int32 (num_blocks,).
    counts_ptr: int32 (256,), added to.
    """
    mean = tl.load(sample_ptr).to(tl.int64) * 256 // tl.maximum(tl.load(sample_ptr + 1), 1)
    mean = mean.to(tl.int32)
    first = tl.program_id(0) * BLOCKS
    x_ptr += first.to(tl.int64) * BLOCK_VALUES
    remaining = tl.minimum(numel - first.to(tl.int64) * BLOCK_VALUES, BLOCKS * BLOCK_VALUES).to(tl.int32)
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    num_empty = tl.zeros([], tl.int32)
    for group in range(0, BLOCKS, GROUP):
        block = group + tl.arange(0, GROUP)
        index = block[:, None] * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)[None, :]
        bits = load_inside(x_ptr, index, remaining, BLOCKS * BLOCK_VALUES, WIDTH)
        nonzero = tl.sum((bits != 0).to(tl.int32), 1)
        if WIDTH == 1:
            code = (nonzero > 0).to(tl.int32)
        else:
            distance = 256 * tl.sum(exponents(bits, WIDTH), 1) // tl.maximum(nonzero, 1) - mean
            code = tl.minimum(tl.maximum(((distance + 128) >> 8) + (mean >> 8), 1), 255)
            code = tl.where(nonzero > 0, code, 0)
        tl.store(codes_ptr + first + block, code.to(tl.uint8), mask=first + block < num_blocks)
        symbol = symbols(bits, code[:, None], WIDTH)
        counts += tl.histogram(tl.reshape(symbol, [GROUP * BLOCK_VALUES]), 256)
        num_empty += tl.sum((code == 0).to(tl.int32), 0)
        record = tl.zeros([GROUP], tl.int32)
        if WIDTH > 1:
            escaped = tl.sum((symbol == ESCAPE).to(tl.int32), 1)
            record = (nonzero - escaped) | (escaped << ESCAPED_SHIFT)
        if WIDTH == 4:
            low = tl.where(symbol == ESCAPE, 0, bits)
            middle = tl.max((((low >> 8) & 255) != 0).to(tl.int32), 1)
            record |= (middle | (tl.max(((low & 255) != 0).to(tl.int32), 1) << 1)) << LOW_PLANES_SHIFT
        tl.store(records_ptr + first + block, record, mask=first + block < num_blocks)
    # Blocks of zeros have no rows.
    counts -= tl.where(bins == 0, num_empty * BLOCK_VALUES, 0)
    tl.atomic_add(counts_ptr + bins, counts, mask=counts > 0)


@triton.jit
def code_kernel(
    x_ptr, codes_ptr, records_ptr, entries_ptr, words_ptr, states_ptr, starts_ptr, tiles_ptr, sizes_ptr, saved_ptr,
    numel, num_blocks, num_tiles, WIDTH: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Codes a tile's symbols and finds out what it takes; one program a tile.

    words_ptr: uint16, CAPACITY a tile, filled from the end. states_ptr: uint32, 128 a tile. starts_ptr: int32, for each
    plane and for the escapes num_blocks: where the block's bytes begin in the tile, -1 if there are none. tiles_ptr:
    int32 (6, num_tiles), the tiles' records. sizes_ptr: int32 (2, num_tiles), the bytes if no tile was coded, and if
    those are that gain by it. saved_ptr: int64, what the latter saves in all.
    """
    tile = tl.program_id(0)
    first = tile * TILE_BLOCKS
    x_ptr += tile.to(tl.int64) * TILE_VALUES
    words_ptr += tile.to(tl.int64) * CAPACITY
    remaining = tl.minimum(numel - tile.to(tl.int64) * TILE_VALUES, TILE_VALUES).to(tl.int32)
    lane = tl.arange(0, LANES)

    member = tl.arange(0, TILE_BLOCKS)
    inside = first + member < num_blocks
    codes = tl.load(codes_ptr + first + member, mask=inside, other=0).to(tl.int32)
    present = codes > 0
    num_present = tl.sum(present.to(tl.int32), 0)
    last = tl.max(tl.where(present, member, -1), 0)

    # The last two rows: their plane 0, or of float8 the symbols themselves, travel in the states.
    at = tl.maximum(last, 0) * BLOCK_VALUES + lane
    front = load_inside(x_ptr, at, remaining, TILE_VALUES, WIDTH)
    back = load_inside(x_ptr, at + LANES, remaining, TILE_VALUES, WIDTH)
    if WIDTH == 1:
        carry = front | (back << 8)
    else:
        code = tl.load(codes_ptr + first + tl.maximum(last, 0)).to(tl.int32)
        carry = _carried(front, code, WIDTH) | (_carried(back, code, WIDTH) << 8)
    state = LOW + carry.to(tl.uint32)
    cursor = tl.full([], CAPACITY, tl.int32)
    for step in range(0, last + 1):
        block = last - step
        # The next block's values are on their way while this one is coded.
        at = tl.maximum(block - 1, 0) * BLOCK_VALUES + lane
        next_front = load_inside(x_ptr, at, remaining, TILE_VALUES, WIDTH)
        next_back = load_inside(x_ptr, at + LANES, remaining, TILE_VALUES, WIDTH)
        code = tl.load(codes_ptr + first + block).to(tl.int32)
        if WIDTH == 1:
            code = tl.where(step == 0, 0, code)
        if code > 0:
            back_entry = tl.load(entries_ptr + symbols(back, code, WIDTH))
            front_entry = tl.load(entries_ptr + symbols(front, code, WIDTH))
            state, cursor = encode_row(state, back_entry, words_ptr, cursor)
            state, cursor = encode_row(state, front_entry, words_ptr, cursor)
        front = next_front
        back = next_back
    tl.store(states_ptr + tile * LANES + lane, state)

    num_words = CAPACITY - cursor
    record = tl.load(records_ptr + first + member, mask=inside, other=0)
    kept = record & COUNT_MASK
    escaped = (record >> ESCAPED_SHIFT) & COUNT_MASK
    num_escapes = tl.sum(escaped, 0)
    head = choose_head(codes, inside)
    tl.store(tiles_ptr + HEAD * num_tiles + tile, head)
    used = (
        section_bytes(head, tl.minimum(num_blocks - first, TILE_BLOCKS))
        + STATE_BYTES
        + (num_words + 1) // 2 * 4
    )
    info = 1 | (num_escapes << ESCAPES_SHIFT)
    if WIDTH > 1:
        starts_ptr += first
        used = place_blocks(starts_ptr, tl.where(member == last, 0, kept), used, inside, 1)
        for plane in tl.static_range(2 if WIDTH == 4 else 0):
            has = (record >> (LOW_PLANES_SHIFT + plane)) & 1
            num_has = tl.sum(has, 0)
            mode = tl.where(num_has == 0, 0, tl.where(num_has == num_present, 1, 2))
            info |= mode << (MODES_SHIFT + 2 * plane)
            tl.store(tiles_ptr + (BITMAPS + plane) * num_tiles + tile, tl.where(mode == 2, used, -1))
            used += tl.where(mode == 2, (num_present + 7) // 8, 0)
            used = place_blocks(starts_ptr + (1 + plane) * num_blocks, kept * has, used, inside, 1)
        planes: tl.constexpr = 3 if WIDTH == 4 else 1
        used = place_blocks(starts_ptr + planes * num_blocks, escaped, used, inside, WIDTH)
    stored_bytes = tl.where(num_present > 0, (remaining * WIDTH + 3) // 4 * 4, 0)
    coded_bytes = (used + 3) // 4 * 4
    gains = (coded_bytes < stored_bytes) & (cursor >= 0)
    if WIDTH == 1:
        gains = gains & (num_present > 1)
    tl.store(sizes_ptr + tile, stored_bytes)
    tl.store(sizes_ptr + num_tiles + tile, tl.where(gains, coded_bytes, stored_bytes))
    tl.store(tiles_ptr + NUM_WORDS * num_tiles + tile, tl.where(gains, num_words, 0))
    tl.store(tiles_ptr + INFO * num_tiles + tile, tl.where(gains, info, 0))
    tl.store(tiles_ptr + USED_BYTES * num_tiles + tile, used)
    tl.atomic_add(saved_ptr, tl.where(gains, stored_bytes - coded_bytes, 0).to(tl.int64))


@triton.jit
def _carried(bits, code, WIDTH: tl.constexpr):
    symbol = symbols(bits, code, WIDTH)
    return tl.where((symbol == 0) | (symbol == ESCAPE), 0, top_bytes(bits, WIDTH))


@triton.jit
def layout_kernel(
    body_ptr, table_ptr, table_bytes_ptr, saved_ptr, sizes_ptr, offsets_ptr, place_ptr, num_tiles,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Decides whether there is a table at all, and where every tile begins; one program.

    body_ptr: int32. offsets_ptr: int64 (num_tiles,), relative to the first tile. place_ptr: int64 (3,), becomes the
    body's bytes, the first tile's place in it, and whether tiles are coded.
    """
    table_bytes = tl.load(table_bytes_ptr)
    coded = tl.load(saved_ptr) > table_bytes
    table_bytes = tl.where(coded, table_bytes, 0)
    chosen_ptr = sizes_ptr + tl.where(coded, num_tiles, 0)
    _, tile_bytes = scan_tiles(chosen_ptr, offsets_ptr, num_tiles, _NO_LIMIT, CHUNK)
    tiles_at = (table_bytes + TABLE_AT).to(tl.int64) + 12 * num_tiles
    tl.store(place_ptr, tiles_at + tile_bytes)
    tl.store(place_ptr + 1, tiles_at)
    tl.store(place_ptr + 2, coded.to(tl.int64))
    tl.store(body_ptr, num_tiles)
    tl.store(body_ptr + 1, table_bytes)
    word = tl.arange(0, 128)
    mask = (word < table_bytes // 4) & (word < TABLE_WORDS)
    tl.store(body_ptr + TABLE_AT // 4 + word, tl.load(table_ptr + word, mask=mask, other=0), mask=mask)


@triton.jit
def place_kernel(
    x_ptr, body_ptr, codes_ptr, records_ptr, words_ptr, states_ptr, starts_ptr, tiles_ptr, sizes_ptr, offsets_ptr,
    place_ptr, numel, num_blocks, num_tiles,
    WIDTH: tl.constexpr, CAPACITY: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes the directory and the tiles; grid (num_tiles, PARTS). body_ptr: uint8, at a multiple of 4 bytes."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    any_coded = tl.load(place_ptr + 2) != 0
    tile_bytes = tl.load(sizes_ptr + tl.where(any_coded, num_tiles, 0) + tile)
    num_words = tl.where(any_coded, tl.load(tiles_ptr + NUM_WORDS * num_tiles + tile), 0)
    info = tl.where(any_coded, tl.load(tiles_ptr + INFO * num_tiles + tile), 0)
    tiles_at = tl.load(place_ptr + 1)
    if part == 0:
        entry_ptr = (body_ptr + (tiles_at - 12 * (num_tiles - tile))).to(tl.pointer_type(tl.int32))
        tl.store(entry_ptr, tile_bytes)
        tl.store(entry_ptr + 1, num_words)
        tl.store(entry_ptr + 2, info)
    target_ptr = body_ptr + tiles_at + tl.load(offsets_ptr + tile)
    x_ptr += tile.to(tl.int64) * TILE_VALUES
    remaining = tl.minimum(numel - tile.to(tl.int64) * TILE_VALUES, TILE_VALUES).to(tl.int32)
    if (info & 1) != 0:
        head = tl.load(tiles_ptr + HEAD * num_tiles + tile)
        count = tl.minimum(num_blocks - tile * TILE_BLOCKS, TILE_BLOCKS)
        states_at = section_bytes(head, count)
        word_target_ptr = (target_ptr + states_at + STATE_BYTES).to(tl.pointer_type(tl.int32))
        source_ptr = words_ptr + tile.to(tl.int64) * CAPACITY + (CAPACITY - num_words)
        copy_words(word_target_ptr, source_ptr, num_words, part, PARTS, 512)
        if part == 0:
            store_codes(target_ptr, codes_ptr + tile * TILE_BLOCKS, head, count)
            state_target_ptr = (target_ptr + states_at).to(tl.pointer_type(tl.int32))
            copy_integers(state_target_ptr, states_ptr + tile * LANES, LANES, 0, 1, LANES)
            padding = tl.load(tiles_ptr + USED_BYTES * num_tiles + tile) + tl.arange(0, 4)
            tl.store(target_ptr + padding, tl.zeros([4], tl.uint8), mask=padding < tile_bytes)
            for plane in tl.static_range(2 if WIDTH == 4 else 0):
                at = tl.load(tiles_ptr + (BITMAPS + plane) * num_tiles + tile)
                if at >= 0:
                    _place_bitmap(target_ptr + at, codes_ptr, records_ptr, tile, plane, num_blocks)
        if WIDTH > 1:
            _place_planes(
                x_ptr, target_ptr, codes_ptr, records_ptr, starts_ptr, tile, part, remaining, num_blocks,
                WIDTH, PARTS, GROUP,
            )  # fmt: skip
    elif tile_bytes > 0:
        _place_values(x_ptr, target_ptr, part, remaining, WIDTH, PARTS, GROUP)


@triton.jit
def _place_bitmap(target_ptr, codes_ptr, records_ptr, tile, plane: tl.constexpr, num_blocks):
    member = tl.arange(0, TILE_BLOCKS)
    block = tile * TILE_BLOCKS + member
    present = (tl.load(codes_ptr + block, mask=block < num_blocks, other=0) > 0).to(tl.int32)
    record = tl.load(records_ptr + block, mask=block < num_blocks, other=0)
    rank = tl.cumsum(present, 0) - present
    bit = ((record >> (LOW_PLANES_SHIFT + plane)) & present) << (rank & 7)
    byte = tl.arange(0, 16)
    value = tl.sum(tl.where((rank >> 3)[None, :] == byte[:, None], bit[None, :], 0), 1)
    tl.store(target_ptr + byte, value.to(tl.uint8), mask=byte < (tl.sum(present, 0) + 7) // 8)


@triton.jit
def _place_planes(
    x_ptr, target_ptr, codes_ptr, records_ptr, starts_ptr, tile, part, remaining, num_blocks,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    part_blocks: tl.constexpr = TILE_BLOCKS // PARTS
    planes: tl.constexpr = 3 if WIDTH == 4 else 1
    for group in range(part * part_blocks, (part + 1) * part_blocks, GROUP):
        block = tile * TILE_BLOCKS + group + tl.arange(0, GROUP)
        inside = block < num_blocks
        record = tl.load(records_ptr + block, mask=inside, other=0)
        # Mostly all values of these blocks have bytes: a plane's are then one run, or none are sent.
        is_run = tl.min((record & _COUNTS_MASK == BLOCK_VALUES).to(tl.int32), 0) != 0
        for plane in tl.static_range(planes):
            start = tl.load(starts_ptr + plane * num_blocks + block, mask=inside, other=-1)
            is_run = is_run & ((tl.min(start, 0) >= 0) | (tl.max(start, 0) < 0))
        if is_run:
            for plane in tl.static_range(planes):
                at = tl.min(tl.load(starts_ptr + plane * num_blocks + block, mask=inside, other=-1), 0)
                if at >= 0:
                    run_ptr = x_ptr + group * BLOCK_VALUES
                    _place_run(run_ptr, target_ptr, at, plane, WIDTH, GROUP * BLOCK_VALUES)
        else:
            member = group + tl.arange(0, GROUP)
            index = member[:, None] * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)[None, :]
            bits = load_bits(x_ptr, index, index < remaining, WIDTH)
            code = tl.load(codes_ptr + block, mask=inside, other=0).to(tl.int32)
            symbol = symbols(bits, code[:, None], WIDTH)
            is_escaped = symbol == ESCAPE
            is_kept = (symbol != 0) & (symbol != ESCAPE)
            # One scan for both ranks.
            both = is_kept.to(tl.int32) | (is_escaped.to(tl.int32) << 16)
            both = tl.cumsum(both, 1) - both
            for plane in tl.static_range(planes):
                start = tl.load(starts_ptr + plane * num_blocks + block, mask=inside, other=-1)[:, None]
                byte = plane_bytes(bits, plane, WIDTH).to(tl.uint8)
                tl.store(target_ptr + start + (both & 0xFFFF), byte, mask=is_kept & (start >= 0))
            start = tl.load(starts_ptr + planes * num_blocks + block, mask=inside, other=-1)
            if tl.max(start, 0) >= 0:
                for i in tl.static_range(WIDTH):
                    at = start[:, None] + (both >> 16) * WIDTH + i
                    mask = is_escaped & (start >= 0)[:, None]
                    tl.store(target_ptr + at, ((bits >> (8 * i)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def _place_run(x_ptr, target_ptr, at, PLANE: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Writes the plane's bytes of COUNT values to consecutive places from `at` on, four with one instruction."""
    ahead = (4 - (at & 3)) & 3  # bytes in front of the first aligned word
    word = tl.arange(0, COUNT // 4)
    value = tl.zeros([COUNT // 4], tl.int32)
    for i in tl.static_range(4):
        index = ahead + 4 * word + i
        bits = load_bits(x_ptr, index, index < COUNT, WIDTH)
        value |= plane_bytes(bits, PLANE, WIDTH) << (8 * i)
    words_ptr = (target_ptr + (at + ahead)).to(tl.pointer_type(tl.int32))
    tl.store(words_ptr + word, value, mask=ahead + 4 * word + 3 < COUNT)
    edge = tl.arange(0, 8)
    index = tl.where(edge < 4, edge, COUNT - 8 + edge)
    mask = tl.where(edge < 4, index < ahead, index >= ahead + (COUNT - ahead) // 4 * 4)
    bits = load_bits(x_ptr, index, mask, WIDTH)
    tl.store(target_ptr + at + index, plane_bytes(bits, PLANE, WIDTH).to(tl.uint8), mask=mask)


@triton.jit
def _place_values(
    x_ptr, target_ptr, part, remaining, WIDTH: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr
):
    part_values: tl.constexpr = TILE_VALUES // PARTS
    chunk: tl.constexpr = GROUP * BLOCK_VALUES
    padded = (remaining * WIDTH + 3) // 4 * 4 // WIDTH
    for first in range(part * part_values, (part + 1) * part_values, chunk):
        index = first + tl.arange(0, chunk)
        value = tl.load(x_ptr + index, mask=index < remaining, other=0)
        tl.store(typed(target_ptr, WIDTH) + index, value, mask=index < padded)
