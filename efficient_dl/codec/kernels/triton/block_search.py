"""The relative step of the block quantizer, searched for on the GPU (docs/format.md, "The relative step k").

The search halves an interval of 321 candidates nine times. In each of three rounds one launch measures the seven
candidates that the next three halvings can reach, all blocks of the sample under all of them in parallel, and a second
one halves; nothing waits for the host.
"""

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
)
from efficient_dl.codec.kernels.triton.rans import LANES

FIRST_INDEX = tl.constexpr(-192)
LAST_INDEX = tl.constexpr(128)
ROUNDS = 3
NODES = tl.constexpr(7)  # three halvings: 1 + 2 + 4 candidates
NODE_COUNTS = tl.constexpr(258)  # 256 symbols, escapes, rows
TOTALS = tl.constexpr(5418)  # ROUNDS * NODES * NODE_COUNTS: here the sample's blocks and values follow
MEASUREMENTS = 5420


@triton.jit
def log2_q16(n):
    """log2 of positive int64 below 2^31 with 16 fraction bits, rounded down."""
    integer = tl.zeros_like(n)
    for level in tl.static_range(5):
        bit = 16 >> level
        integer += tl.where((n >> (integer + bit)) > 0, bit, 0)
    mantissa = n << (30 - integer)
    result = integer
    for _ in tl.static_range(16):
        mantissa = (mantissa * mantissa) >> 30
        carry = mantissa >> 31
        mantissa = mantissa >> carry
        result = (result << 1) | carry
    return result


@triton.jit(do_not_specialize=["bits_q16"])
def narrow_kernel(measured_ptr, interval_ptr, index_ptr, bits_q16, DONE: tl.constexpr, MODE: tl.constexpr):
    """One program: halves the interval three times by what round DONE measured; after the last one, chooses.

    interval_ptr: int32 (2,), the first and the last candidate that are left. index_ptr: int32 (1,), the chosen one.
    """
    node = tl.arange(0, 8)
    counts_ptr = measured_ptr + (DONE * NODES + node) * NODE_COUNTS
    place = counts_ptr[:, None] + tl.arange(0, 256)[None, :]
    count = tl.load(place, mask=(node < NODES)[:, None], other=0).to(tl.int64)
    escapes = tl.load(counts_ptr + 256, mask=node < NODES, other=0).to(tl.int64)
    rows = tl.load(counts_ptr + 257, mask=node < NODES, other=0).to(tl.int64)
    total_log = log2_q16(tl.maximum(tl.sum(count, 1), 1))
    cost = tl.sum(count * (total_log[:, None] - log2_q16(tl.maximum(count, 1))), 1)
    cost += escapes * ((32 if MODE == PAIRS else 16) * 65536)
    num_sampled = tl.load(measured_ptr + TOTALS)
    values = tl.load(measured_ptr + TOTALS + 1).to(tl.int64) * bits_q16
    budget = values - num_sampled.to(tl.int64) * (8 * 65536) - rows * (4 * 65536)
    within = (cost <= tl.maximum(budget, values >> 1)).to(tl.int32)
    if DONE == 0:
        low = tl.full([], FIRST_INDEX, tl.int32)
        high = tl.full([], LAST_INDEX, tl.int32)
    else:
        low = tl.load(interval_ptr)
        high = tl.load(interval_ptr + 1)
    here = tl.zeros([], tl.int32)
    for _ in tl.static_range(3):
        unsettled = low < high
        middle = (low + high) >> 1
        fits = tl.sum(tl.where(node == here, within, 0), 0) != 0
        high = tl.where(unsettled & fits, middle, high)
        low = tl.where(unsettled & (fits == 0), middle + 1, low)
        here = 2 * here + tl.where(fits, 1, 2)
    tl.store(interval_ptr, low)
    tl.store(interval_ptr + 1, high)
    if DONE == 2:
        # Without a sample worth the name the rate alone decides.
        without = tl.minimum(tl.maximum(65 - ((32 * bits_q16) >> 16), FIRST_INDEX), LAST_INDEX)
        tl.store(index_ptr, tl.where(num_sampled < 8, without, low))


@triton.jit(do_not_specialize=["numel", "num_blocks", "stride"])
def measure_kernel(
    x_ptr,
    residual_ptr,
    starts_ptr,
    steps_ptr,
    measured_ptr,
    interval_ptr,
    numel,
    num_blocks,
    stride,
    DONE: tl.constexpr,
    BLOCKS: tl.constexpr,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Measures BLOCKS blocks of the sample under one of seven candidates. Grid: (7, blocks of the sample / BLOCKS).

    measured_ptr: int32 (MEASUREMENTS,), zero before the first round. steps_ptr: float32 (321,).
    """
    node = tl.program_id(0)
    if DONE == 0:
        low = tl.full([], FIRST_INDEX, tl.int32)
        high = tl.full([], LAST_INDEX, tl.int32)
    else:
        low = tl.load(interval_ptr)
        high = tl.load(interval_ptr + 1)
    # Node 1 + 2 d + b continues node d: to the left (b = 0) if that was within the budget.
    depth = tl.where(node == 0, 0, tl.where(node < 3, 1, 2))
    for level in tl.static_range(2):
        below = ((node + 1) >> tl.maximum(depth - 1 - level, 0)) & 1
        middle = (low + high) >> 1
        descend = (level < depth) & (low < high)
        high = tl.where(descend & (below == 0), middle, high)
        low = tl.where(descend & (below != 0), middle + 1, low)
    index = (low + high) >> 1
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)) * stride
    start, length = block_places(block, starts_ptr, numel, num_blocks, HAS_STARTS)
    length = tl.where(length >= 64, length, 0)
    _, _, first, second, exponent, _ = quantize_blocks(
        x_ptr,
        residual_ptr,
        start,
        length,
        tl.load(steps_ptr + index - FIRST_INDEX),
        BLOCKS,
        DTYPE,
        HAS_RESIDUAL,
    )
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
    coded = (largest > 0)[:, None]
    first = first.to(tl.int32)
    second = second.to(tl.int32)
    rows = tl.sum((largest > 0).to(tl.int32), 0)
    counted = tl.broadcast_to(coded, (BLOCKS, LANES)).reshape([BLOCKS * LANES])
    if MODE == PAIRS:
        symbol, escaped = pair_symbols(first, second)
        count = tl.histogram(symbol.reshape([BLOCKS * LANES]), 256, mask=counted)
    else:
        rows *= 2
        symbol, escaped = byte_symbols(first)
        count = tl.histogram(symbol.reshape([BLOCKS * LANES]), 256, mask=counted)
        symbol, more = byte_symbols(second)
        count += tl.histogram(symbol.reshape([BLOCKS * LANES]), 256, mask=counted)
        escaped += more
    counts_ptr = measured_ptr + (DONE * NODES + node) * NODE_COUNTS
    place = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + place, count, mask=count > 0)
    tl.atomic_add(counts_ptr + 256, tl.sum(tl.sum(escaped, 1), 0))
    tl.atomic_add(counts_ptr + 257, rows)
    if DONE == 0:  # noqa: SIM102 (known when compiled; the next one is not)
        if node == 0:
            sampled = (length > 0) & (exponent > 0) & (exponent < 253)
            tl.atomic_add(measured_ptr + TOTALS, tl.sum(sampled.to(tl.int32), 0))
            tl.atomic_add(measured_ptr + TOTALS + 1, tl.sum(tl.where(sampled, length, 0), 0))
