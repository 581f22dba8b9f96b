"""Blocks of values to integers and symbols on a GPU, in the exact arithmetic of docs/format.md, codec 2.

Kernels that use these functions are launched with enable_fp_fusion=False: a fused multiply-add rounds once too few.
"""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.block_layout import block_start
from efficient_dl.codec.kernels.triton.rans import LANES
from efficient_dl.codec.kernels.triton.split_values import BFLOAT16, FLOAT16, FLOAT32, from_float, to_float

PAIRS = tl.constexpr(0)
PAIR_ESCAPE = tl.constexpr(121)
PAIR_RADIUS = tl.constexpr(5)
BYTE_ESCAPE = tl.constexpr(255)
BYTE_RADIUS = tl.constexpr(127)
# Added and taken away again, it rounds to an integer, half to even: 1.5 * 2^23.
ROUNDING = tl.constexpr(12582912.0)
MAX_Q = tl.constexpr(32767.0)


@triton.jit
def load_values(x_ptr, residual_ptr, place, mask, DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Values as float32, 0 where the mask is not set. bfloat16 comes as int16, float8 as uint8."""
    if DTYPE == BFLOAT16:
        value = (tl.load(x_ptr + place, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE > FLOAT16:
        # In integers: not every GPU converts float8.
        value = to_float(tl.load(x_ptr + place, mask=mask, other=0).to(tl.int32), DTYPE)
    else:
        value = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + place, mask=mask, other=0.0)
    return value


@triton.jit
def store_values(out_ptr, place, value, mask, DTYPE: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Stores float32 values, or their sums with what is there, rounded to the output's dtype, half to even."""
    if ACCUMULATE:
        value = load_values(out_ptr, out_ptr, place, mask, DTYPE, False) + value
    if DTYPE == FLOAT32:
        tl.store(out_ptr + place, value, mask=mask)
    if DTYPE == BFLOAT16:
        # In integers: the interpreter's conversion truncates.
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits >> 16) & 0xFFFF) + (((bits & 0xFFFF) + ((bits >> 16) & 1) + 0x7FFF) >> 16)
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(out_ptr + place, rounded.to(tl.int16), mask=mask)
    if DTYPE == FLOAT16:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
        bits = tl.where(value == value, bits, 0x7E00)
        tl.store(out_ptr + place, bits.to(tl.float16, bitcast=True), mask=mask)
    if DTYPE > FLOAT16:
        bits = tl.where(value == value, from_float(value, DTYPE), 0x7F)
        tl.store(out_ptr + place, bits.to(tl.uint8), mask=mask)


@triton.jit
def block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS: tl.constexpr):
    """Start and length, int32, of each of the blocks; length 0 behind the last block."""
    inside = tl.minimum(block, num_blocks - 1)
    start = block_start(inside, starts_ptr, numel, HAS_STARTS)
    length = block_start(inside + 1, starts_ptr, numel, HAS_STARTS) - start
    return start, tl.where(block < num_blocks, length, 0)


@triton.jit
def add_halves(value, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCKS, WIDTH) to (BLOCKS, WIDTH / 2): a_j + a_(j + WIDTH / 2)."""
    low, high = tl.split(tl.permute(tl.reshape(value, (BLOCKS, 2, WIDTH // 2)), (0, 2, 1)))
    return low + high


@triton.jit
def sum_squares(
    x_ptr,
    residual_ptr,
    start,
    length,
    factor,
    dead,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The sum of the squares of value * factor in each block, in the order that the format fixes; 0 for dead blocks.

    Reads the values once more, from the cache: 16 lanes at a time is the order of the sum, not of the memory.
    """
    lane = tl.arange(0, 16)[None, :]
    total = tl.zeros([BLOCKS, 16], tl.float32)
    for group in tl.static_range(16):
        mask = (16 * group + lane < length[:, None]) & (dead == 0)[:, None]
        place = start[:, None] + 16 * group + lane
        value = load_values(x_ptr, residual_ptr, place, mask, DTYPE, HAS_RESIDUAL) * factor[:, None]
        total += value * value
    total = add_halves(total, BLOCKS, 16)
    total = add_halves(total, BLOCKS, 8)
    total = add_halves(total, BLOCKS, 4)
    low, high = tl.split(total)
    return low + high


@triton.jit
def round_scaled(value, inverse):
    """round_half_even(value * inverse), clamped, as a float32."""
    scaled = tl.minimum(tl.maximum(value * inverse, -MAX_Q), MAX_Q)
    return (scaled + ROUNDING) - ROUNDING


@triton.jit
def step_of(code):
    """The step that an absolute code stands for."""
    return (code << 21).to(tl.float32, bitcast=True)


@triton.jit
def quantize_blocks(
    x_ptr,
    residual_ptr,
    start,
    length,
    relative_step,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Quantizes BLOCKS blocks of at most 256 values.

    start, length: int32 (BLOCKS,). Returns the values and the integers, as float32, of the first and of the second
    128 places, the blocks' exponents (0: nothing but zeros and denormals; 253 and more: not finite) and absolute codes.
    """
    lane = tl.arange(0, LANES)[None, :]
    place = start[:, None] + lane
    first = load_values(x_ptr, residual_ptr, place, lane < length[:, None], DTYPE, HAS_RESIDUAL)
    second = load_values(
        x_ptr, residual_ptr, place + LANES, lane + LANES < length[:, None], DTYPE, HAS_RESIDUAL
    )
    largest = tl.maximum(
        first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, second.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    )
    exponent = tl.max(largest, 1) >> 23
    dead = ((exponent >= 253) | (exponent == 0)).to(tl.int32)
    factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    total = sum_squares(x_ptr, residual_ptr, start, length, factor, dead, BLOCKS, DTYPE, HAS_RESIDUAL)
    # A coarse step would round all values of a tiny block to zero.
    relative = tl.where(length <= 16, tl.minimum(relative_step, 0.0625), relative_step)
    scale = tl.sqrt_rn(tl.div_rn(total, tl.maximum(length, 1).to(tl.float32))) * relative
    code = ((scale.to(tl.int32, bitcast=True) + (1 << 20)) >> 21) + 4 * (exponent - 127)
    code = tl.minimum(tl.maximum(code, 4), 1007)
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), step_of(code))[:, None]
    alive = (dead == 0)[:, None]
    q_first = round_scaled(tl.where(alive, first, 0.0), inverse)
    q_second = round_scaled(tl.where(alive, second, 0.0), inverse)
    return first, second, q_first, q_second, exponent, code


@triton.jit
def pair_symbols(first, second):
    """Symbols of pairs of integers, and which are escapes (int32)."""
    escaped = (tl.maximum(tl.abs(first), tl.abs(second)) > PAIR_RADIUS).to(tl.int32)
    symbol = (first + PAIR_RADIUS) * 11 + second + PAIR_RADIUS
    return tl.where(escaped != 0, PAIR_ESCAPE, symbol), escaped


@triton.jit
def byte_symbols(q):
    """Symbols of integers, and which are escapes (int32)."""
    escaped = (tl.abs(q) > BYTE_RADIUS).to(tl.int32)
    return tl.where(escaped != 0, BYTE_ESCAPE, q + BYTE_RADIUS), escaped


@triton.jit
def read_integers(symbols_ptr, escapes_ptr, block, MODE: tl.constexpr):
    """The integers of one block, int32 (128,) twice, from what `block_quantize.quantize_kernel` wrote."""
    lane = tl.arange(0, LANES)
    escapes_ptr += block.to(tl.int64) * 256
    if MODE == PAIRS:
        symbol = tl.load(symbols_ptr + block.to(tl.int64) * LANES + lane).to(tl.int32)
        escaped = symbol == PAIR_ESCAPE
        rank = 2 * (tl.cumsum(escaped.to(tl.int32), 0) - 1)
        first = tl.load(escapes_ptr + rank, mask=escaped, other=0).to(tl.int32)
        second = tl.load(escapes_ptr + rank + 1, mask=escaped, other=0).to(tl.int32)
        first = tl.where(escaped, first, symbol // 11 - PAIR_RADIUS)
        second = tl.where(escaped, second, symbol % 11 - PAIR_RADIUS)
    else:
        symbols_ptr += block.to(tl.int64) * (2 * LANES)
        symbol = tl.load(symbols_ptr + lane).to(tl.int32)
        escaped = symbol == BYTE_ESCAPE
        rank = tl.cumsum(escaped.to(tl.int32), 0) - 1
        first = tl.load(escapes_ptr + rank, mask=escaped, other=0).to(tl.int32)
        first = tl.where(escaped, first, symbol - BYTE_RADIUS)
        count = tl.sum(escaped.to(tl.int32), 0)
        symbol = tl.load(symbols_ptr + LANES + lane).to(tl.int32)
        escaped = symbol == BYTE_ESCAPE
        rank = count + tl.cumsum(escaped.to(tl.int32), 0) - 1
        second = tl.load(escapes_ptr + rank, mask=escaped, other=0).to(tl.int32)
        second = tl.where(escaped, second, symbol - BYTE_RADIUS)
    return first, second
