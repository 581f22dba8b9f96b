"""One row of the tile coder (docs/format.md) on a GPU: 128 lanes a step, words ranked by a prefix sum.

A program runs one tile with one warp (four lanes a thread), so that a prefix sum is a few shuffles and no barrier.
"""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(128)
STATE_BYTES = tl.constexpr(512)
LOW = tl.constexpr(1 << 16)


@triton.jit
def divide(state, frequency, reciprocal):
    """floor(state / frequency) without a division; uint32, state < 2^20 * frequency, frequency from 1 to 4096.

    reciprocal: min(floor(2^32 / frequency), 2^32 - 1), that is (2^32 - e) / f with 0 <= e < f, or e = 1 if f is 1. The
    product's upper half is floor(x / f - x * e / (f * 2^32)). As x < 2^20 * f and e <= f, what is taken away is less
    than f / 2^12 <= 1, so that the estimate is the quotient or one less, which the remainder tells apart.
    """
    quotient = tl.umulhi(state, reciprocal)
    return quotient + (state - quotient * frequency >= frequency).to(tl.uint32)


@triton.jit
def by_thread(row):
    """A row (128,) as (4, 32), lane i at [i % 4, i // 4]: a store takes the threads along the last dimension.

    A store with computed addresses would take lanes 32 apart into a thread, and move the row there through shared
    memory. As columns, a thread's four lanes stay with it.
    """
    return tl.trans(tl.reshape(row, [32, 4]))


@triton.jit
def encode_row(state, entry, words_ptr, cursor):
    """Codes one row and writes its words in front of the tile's words; rows are visited from the last to the first.

    state: uint32 (128,). entry: uint64 (128,), of the lanes' symbols in the table of `tables.build_kernel`. words_ptr:
    uint16, the tile's slot; cursor: int32 scalar, the slot's index of the first word there is. Words in front of the
    slot are not stored: a cursor below 0 says that the tile did not fit. Returns (state, cursor).
    """
    packed = entry.to(tl.uint32)
    frequency = packed & 0xFFFF
    emits = (state >> 20) >= frequency
    emitted = emits.to(tl.int32)
    cursor -= tl.sum(emitted, 0)
    index = cursor + tl.cumsum(emitted, 0) - emitted
    word = (state & 0xFFFF).to(tl.uint16)
    tl.store(words_ptr + by_thread(index), by_thread(word), mask=by_thread(emits & (index >= 0)))
    state = tl.where(emits, state >> 16, state)
    # The same as (quotient << 12) + remainder + start.
    quotient = divide(state, frequency, (entry >> 32).to(tl.uint32))
    return state + quotient * (4096 - frequency) + (packed >> 16), cursor


@triton.jit
def decode_row(state, slots_ptr, words_ptr, position, end):
    """Decodes one row; rows are visited from the first to the last.

    state: uint32 (128,). slots_ptr: uint32 (4096,), the table of `tables.expand_kernel`. words_ptr: uint16, the tile's
    words; position: int32 scalar, how many of them have been read. Words from `end` on are taken as 0 and counted all
    the same: a position beyond `end` says that the tile is corrupt. Returns (state, symbol: int32 (128,), position).
    """
    state, symbol, needs = step_back(state, slots_ptr)
    needed = needs.to(tl.int32)
    index = position + tl.cumsum(needed, 0) - needed
    state = refill(state, needs, words_ptr, index, end)
    return state, symbol, position + tl.sum(needed, 0)


@triton.jit
def decode_ranked_row(state, slots_ptr, words_ptr, position, end):
    """As `decode_row`, and ranks the symbols other than 0, in the same prefix sum as the words.

    Returns (state, symbol, position, rank: int32 (128,), how many are in front of each, count: int32 scalar of them).
    """
    state, symbol, needs = step_back(state, slots_ptr)
    both = needs.to(tl.int32) | ((symbol != 0).to(tl.int32) << 16)
    rank = tl.cumsum(both, 0) - both
    state = refill(state, needs, words_ptr, position + (rank & 0xFFFF), end)
    total = tl.sum(both, 0)
    return state, symbol, position + (total & 0xFFFF), rank >> 16, total >> 16


@triton.jit
def step_back(state, slots_ptr):
    """Takes a symbol out of each state; returns (state, symbol, needs: whether the state lacks a word)."""
    slot = tl.load(slots_ptr + (state & 4095).to(tl.int32))
    state = (((slot >> 8) & 4095) + 1) * (state >> 12) + (slot >> 20)
    return state, (slot & 255).to(tl.int32), state < LOW


@triton.jit
def refill(state, needs, words_ptr, index, end):
    """Appends the words at `index` to the states that need one; words from `end` on are 0."""
    word = tl.load(words_ptr + index, mask=needs & (index < end), other=0).to(tl.uint32)
    return tl.where(needs, (state << 16) | word, state)
