"""The fused first pass of the block quantizer on a GPU: residual in, quantize, symbols, counts, residual out; and the
second, over the blocks' codes: the packet's base, and which blocks have rows."""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.block_values import (
    PAIRS,
    block_places,
    byte_symbols,
    pair_symbols,
    quantize_blocks,
    read_integers,
    step_of,
)
from efficient_dl.codec.kernels.triton.rans import LANES

# What quantize_kernel writes for blocks without an absolute code, which is at least 4.
EMPTY = tl.constexpr(0)
NONFINITE = tl.constexpr(-1)


@triton.jit
def store_escapes(escapes_ptr, block, rank, value, mask):
    """Stores escaped integers as int16 in the room of their block, 256 places each."""
    place = (block.to(tl.int64) * 256)[:, None] + rank
    tl.store(escapes_ptr + place, value.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["numel", "num_blocks"])
def quantize_kernel(
    x_ptr,
    residual_ptr,
    starts_ptr,
    steps_ptr,
    index_ptr,
    symbols_ptr,
    escapes_ptr,
    codes_ptr,
    num_escapes_ptr,
    counts_ptr,
    largest_code_ptr,
    numel,
    num_blocks,
    BLOCKS: tl.constexpr,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Quantizes the tensor; each program takes BLOCKS blocks at a time, and every num_programs-th group of them.

    symbols_ptr: uint8 (num_blocks, 128 or 256). escapes_ptr: int16 (num_blocks, 256), the escaped integers of each
    block in front. codes_ptr: int16 (num_blocks,), absolute codes, EMPTY or NONFINITE. num_escapes_ptr: int32
    (num_blocks,). counts_ptr: int32 (256,) and largest_code_ptr: int32 (1,), which are zero, over all coded blocks.
    residual_ptr: float32 (numel,), replaced by what the integers leave over.
    """
    lane = tl.arange(0, LANES)[None, :]
    relative_step = tl.load(steps_ptr + tl.load(index_ptr) + 192)
    count = tl.zeros([256], tl.int32)
    largest_code = tl.zeros([], tl.int32)
    for group in range(tl.program_id(0), tl.cdiv(num_blocks, BLOCKS), tl.num_programs(0)):
        block = group * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        start, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
        u_first, u_second, q_first, q_second, exponent, code = quantize_blocks(
            x_ptr, residual_ptr, start, length, relative_step, BLOCKS, DTYPE, HAS_RESIDUAL
        )
        nonfinite = exponent >= 253
        if HAS_RESIDUAL:
            # Exact: integers have 15 bits and steps 3.
            step = step_of(code)[:, None]
            keep = (exponent < 253)[:, None]
            place = start[:, None] + lane
            left = tl.where(keep, u_first - q_first * step, 0.0)
            tl.store(residual_ptr + place, left, mask=lane < length[:, None])
            left = tl.where(keep, u_second - q_second * step, 0.0)
            tl.store(residual_ptr + place + LANES, left, mask=lane + LANES < length[:, None])
        coded = tl.max(tl.maximum(tl.abs(q_first), tl.abs(q_second)), 1) > 0
        largest_code = tl.maximum(largest_code, tl.max(tl.where(coded, code, 0), 0))
        code = tl.where(nonfinite, NONFINITE, tl.where(coded, code, EMPTY))
        tl.store(codes_ptr + block, code.to(tl.int16), mask=inside)
        first = q_first.to(tl.int32)
        second = q_second.to(tl.int32)
        counted = tl.broadcast_to(coded[:, None], (BLOCKS, LANES)).reshape([BLOCKS * LANES])
        wide = block.to(tl.int64)[:, None]
        if MODE == PAIRS:
            symbol, escaped = pair_symbols(first, second)
            tl.store(symbols_ptr + wide * LANES + lane, symbol.to(tl.uint8), mask=inside[:, None])
            count += tl.histogram(symbol.reshape([BLOCKS * LANES]), 256, mask=counted)
            num_escapes = tl.sum(escaped, 1)
            if tl.max(num_escapes, 0) > 0:
                rank = 2 * (tl.cumsum(escaped, 1) - escaped)
                store_escapes(escapes_ptr, block, rank, first, escaped != 0)
                store_escapes(escapes_ptr, block, rank + 1, second, escaped != 0)
        else:
            symbol, escaped = byte_symbols(first)
            tl.store(symbols_ptr + wide * (2 * LANES) + lane, symbol.to(tl.uint8), mask=inside[:, None])
            count += tl.histogram(symbol.reshape([BLOCKS * LANES]), 256, mask=counted)
            symbol, more = byte_symbols(second)
            tl.store(
                symbols_ptr + wide * (2 * LANES) + LANES + lane, symbol.to(tl.uint8), mask=inside[:, None]
            )
            count += tl.histogram(symbol.reshape([BLOCKS * LANES]), 256, mask=counted)
            in_first = tl.sum(escaped, 1)
            num_escapes = in_first + tl.sum(more, 1)
            if tl.max(num_escapes, 0) > 0:
                store_escapes(escapes_ptr, block, tl.cumsum(escaped, 1) - escaped, first, escaped != 0)
                rank = in_first[:, None] + tl.cumsum(more, 1) - more
                store_escapes(escapes_ptr, block, rank, second, more != 0)
        tl.store(num_escapes_ptr + block, num_escapes, mask=inside)
    place = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + place, count, mask=count > 0)
    tl.atomic_max(largest_code_ptr, largest_code)


@triton.jit
def return_block(
    residual_ptr,
    starts_ptr,
    symbols_ptr,
    escapes_ptr,
    block,
    code,
    numel,
    num_blocks,
    MODE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Adds the integers of a block that is not sent to its residual again. Exact: it is what they were taken from."""
    lane = tl.arange(0, LANES)
    start, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
    first, second = read_integers(symbols_ptr, escapes_ptr, block, MODE)
    step = step_of(code)
    place = start + lane
    left = tl.load(residual_ptr + place, mask=(lane < length) & (first != 0), other=0.0)
    left += first.to(tl.float32) * step
    tl.store(residual_ptr + place, left, mask=(lane < length) & (first != 0))
    place += LANES
    left = tl.load(residual_ptr + place, mask=(lane + LANES < length) & (second != 0), other=0.0)
    left += second.to(tl.float32) * step
    tl.store(residual_ptr + place, left, mask=(lane + LANES < length) & (second != 0))


@triton.jit(do_not_specialize=["numel", "num_blocks"])
def finish_codes_kernel(
    residual_ptr,
    starts_ptr,
    symbols_ptr,
    escapes_ptr,
    codes_ptr,
    num_escapes_ptr,
    counts_ptr,
    largest_code_ptr,
    sent_codes_ptr,
    order_ptr,
    escapes_before_ptr,
    tile_blocks_ptr,
    tile_values_ptr,
    tile_escapes_ptr,
    numel,
    num_blocks,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    MODE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """One program a tile of T blocks: the codes as they are sent, and the list of the blocks that have rows.

    sent_codes_ptr: uint8, num_blocks padded with zeros to a multiple of 4. order_ptr: int32, tile t's coded blocks from
    place t T on. escapes_before_ptr: int32, for each of these the escapes in front of it in its tile. tile_*_ptr: int32
    (tiles,): coded blocks, symbols if stored, escapes.
    A block whose code falls below the base, 63 octaves under the largest, is taken out of the counts again.
    """
    tile = tl.program_id(0)
    base = tl.maximum(tl.load(largest_code_ptr) - 254, 3)
    num_coded = tl.zeros([], tl.int32)
    num_values = tl.zeros([], tl.int32)
    num_escapes = tl.zeros([], tl.int32)
    for chunk in range(0, T, CHUNK):
        lane = tl.arange(0, CHUNK)
        block = tile * T + chunk + lane
        inside = (block < num_blocks) & (chunk + lane < T)
        code = tl.load(codes_ptr + block, mask=inside, other=0).to(tl.int32)
        coded = code > base
        sent = tl.where(code == NONFINITE, 255, tl.where(coded, code - base, 0))
        padded = (block < tl.cdiv(num_blocks, 4) * 4) & (chunk + lane < T)
        tl.store(sent_codes_ptr + block, sent.to(tl.uint8), mask=padded)
        fallen = ((code > 0) & (code <= base)).to(tl.int32)
        if tl.max(fallen, 0) > 0:
            for i in range(CHUNK):
                here = tl.sum(tl.where(lane == i, fallen * code, 0), 0)
                if here > 0:
                    gone = tile * T + chunk + i
                    row = symbols_ptr + gone.to(tl.int64) * (LANES if MODE == PAIRS else 2 * LANES)
                    one = tl.full([LANES], -1, tl.int32)
                    tl.atomic_add(counts_ptr + tl.load(row + tl.arange(0, LANES)).to(tl.int32), one)
                    if MODE != PAIRS:
                        row += LANES
                        tl.atomic_add(counts_ptr + tl.load(row + tl.arange(0, LANES)).to(tl.int32), one)
                    if HAS_RESIDUAL:
                        return_block(
                            residual_ptr,
                            starts_ptr,
                            symbols_ptr,
                            escapes_ptr,
                            gone,
                            here,
                            numel,
                            num_blocks,
                            MODE,
                            HAS_STARTS,
                        )
        _, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
        present = coded.to(tl.int32)
        values = tl.where(coded, tl.minimum(length, LANES) if MODE == PAIRS else length, 0)
        escapes = tl.load(num_escapes_ptr + block, mask=inside & coded, other=0)
        rank = tile * T + num_coded + tl.cumsum(present, 0) - 1
        tl.store(order_ptr + rank, block, mask=coded)
        before = num_escapes + tl.cumsum(escapes, 0) - escapes
        tl.store(escapes_before_ptr + rank, before, mask=coded)
        num_coded += tl.sum(present, 0)
        num_values += tl.sum(values, 0)
        num_escapes += tl.sum(escapes, 0)
    tl.store(tile_blocks_ptr + tile, num_coded)
    tl.store(tile_values_ptr + tile, num_values)
    tl.store(tile_escapes_ptr + tile, num_escapes)
