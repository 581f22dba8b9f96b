"""Frequency tables on a GPU: from counts to 12-bit probabilities and their bytes, and back (docs/format.md)."""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

MAX_ALPHABET = tl.constexpr(256)
TABLE_WORDS = tl.constexpr(104)  # 416 bytes: the bitmap and the fields of 256 symbols


@triton.jit
def normalize(count):
    """Frequencies that sum to 4096. count: int64 (256,); returns int64 (256,), all 0 if there is nothing to count.

    A correction step changes one symbol, so one division a step suffices. The key holds the cost or gain above the
    symbol, which makes the reduction take the lowest symbol on ties.
    """
    symbol = tl.arange(0, MAX_ALPHABET).to(tl.int64)
    total = tl.sum(count, 0)
    divisor = tl.maximum(total, 1)
    frequency = tl.where(count > 0, tl.maximum((count * 4096 + divisor // 2) // divisor, 1), 0)
    weight = count << 20
    none = tl.full([], 1 << 62, tl.int64)
    excess = tl.where(total > 0, tl.sum(frequency, 0) - 4096, 0)
    key = tl.where(frequency > 1, ((weight // tl.maximum(2 * frequency - 1, 1)) << 8) | symbol, none)
    while excess > 0:
        chosen = symbol == (tl.min(key, 0) & 255)
        frequency -= chosen.to(tl.int64)
        # One reduction for both numbers: counts have less than 32 bits, frequencies less than 14.
        both = tl.sum(tl.where(chosen, (count << 14) | frequency, 0), 0)
        f = both & 16383
        cost = ((both >> 14) << 20) // tl.maximum(2 * f - 1, 1)
        key = tl.where(chosen, tl.where(f > 1, (cost << 8) | symbol, none), key)
        excess -= 1
    key = tl.where(frequency > 0, ((weight // (2 * frequency + 1)) << 8) | (255 - symbol), -1)
    while excess < 0:
        chosen = symbol == 255 - (tl.max(key, 0) & 255)
        frequency += chosen.to(tl.int64)
        both = tl.sum(tl.where(chosen, (count << 14) | frequency, 0), 0)
        gain = ((both >> 14) << 20) // (2 * (both & 16383) + 1)
        key = tl.where(chosen, (gain << 8) | (255 - symbol), key)
        excess += 1
    return frequency


@triton.jit
def reciprocals(frequency):
    """min(floor(2^32 / frequency), 2^32 - 1), uint64; of frequency 0, which nothing divides by, that of 1."""
    quotient = (1 << 32) // tl.maximum(frequency, 1).to(tl.int64)
    return tl.minimum(quotient, (1 << 32) - 1).to(tl.uint64)


@triton.jit
def build_kernel(counts_ptr, entries_ptr, table_ptr, bytes_ptr, ALPHABET: tl.constexpr):
    """Normalizes counts, int32 (256,), and writes what an encoder needs of the table. One program.

    entries_ptr: uint64 (256,), becomes frequency | start << 16 | reciprocal << 32, the latter as `rans.divide` wants
    it. table_ptr: int32 (104,), must be zero, becomes the serialized table. bytes_ptr: int32, its bytes, 0 without
    counts.
    """
    symbol = tl.arange(0, MAX_ALPHABET)
    # Unsigned: all 2^31 values of a tensor and the padding behind its end may be one symbol.
    count = tl.load(counts_ptr + symbol).to(tl.uint32, bitcast=True).to(tl.int64)
    frequency = normalize(count).to(tl.int32)
    entry = frequency | ((tl.cumsum(frequency, 0) - frequency) << 16)
    tl.store(entries_ptr + symbol, entry.to(tl.uint64) | (reciprocals(frequency) << 32))
    present = frequency > 0
    rank = tl.cumsum(present.to(tl.int32), 0) - 1
    # All fields have bits of their own, so that adding is putting together.
    one = tl.full([MAX_ALPHABET], 1, tl.uint32)
    bit = (one << (symbol & 31).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_add(table_ptr + (symbol >> 5), bit, mask=present)
    position = (ALPHABET + 7) // 8 * 8 + 12 * rank
    shift = (position & 31).to(tl.uint32)
    field = tl.where(present, frequency - 1, 0).to(tl.uint32)
    low = (field << shift).to(tl.int32, bitcast=True)
    tl.atomic_add(table_ptr + (position >> 5), low, mask=present)
    high = (field >> ((32 - shift) & 31)).to(tl.int32, bitcast=True)
    tl.atomic_add(table_ptr + (position >> 5) + 1, high, mask=present & (shift > 20))
    num_present = tl.sum(present.to(tl.int32), 0)
    table_bytes = ((ALPHABET + 7) // 8 + (12 * num_present + 7) // 8 + 3) // 4 * 4
    tl.store(bytes_ptr, tl.where(num_present > 0, table_bytes, 0))


@triton.jit
def parse_table(table_ptr, table_bytes, entries_ptr, ALPHABET: tl.constexpr):
    """Reads a serialized table of `table_bytes` bytes; returns whether it is one that `build_kernel` could write.

    table_ptr: uint8; nothing behind table_bytes is read. entries_ptr: uint32 (256,), becomes frequency | start << 16
    (all 0 if the table is not valid, so that every slot of `expand_kernel` is harmless).
    """
    symbol = tl.arange(0, MAX_ALPHABET)
    bitmap_bytes: tl.constexpr = (ALPHABET + 7) // 8
    inside = (symbol >> 3) < bitmap_bytes
    bitmap = tl.load(table_ptr + (symbol >> 3), mask=inside & ((symbol >> 3) < table_bytes), other=0)
    bit = (bitmap.to(tl.int32) >> (symbol & 7)) & 1
    outside = tl.sum(tl.where(symbol >= ALPHABET, bit, 0), 0)
    present = (bit != 0) & (symbol < ALPHABET)
    num_present = tl.sum(present.to(tl.int32), 0)
    rank = tl.cumsum(present.to(tl.int32), 0) - 1
    byte = bitmap_bytes + 3 * rank // 2
    first = tl.load(table_ptr + byte, mask=present & (byte < table_bytes), other=0).to(tl.int32)
    second = tl.load(table_ptr + byte + 1, mask=present & (byte + 1 < table_bytes), other=0).to(tl.int32)
    field = ((first | (second << 8)) >> (4 * (rank & 1))) & 4095
    frequency = tl.where(present, field + 1, 0)
    end = bitmap_bytes + (12 * num_present + 7) // 8
    # An odd number of fields leaves half a byte, and up to three bytes follow.
    half_at = bitmap_bytes + 12 * num_present // 8
    half = tl.load(table_ptr + half_at, mask=((num_present & 1) != 0) & (half_at < table_bytes), other=0)
    padding = end + tl.arange(0, 4)
    rest = tl.load(table_ptr + padding, mask=padding < table_bytes, other=0).to(tl.int32)
    valid = (table_bytes == (end + 3) // 4 * 4) & (tl.sum(frequency, 0) == 4096) & (outside == 0)
    valid = valid & ((half.to(tl.int32) >> 4) == 0) & (tl.sum(rest, 0) == 0)
    frequency = tl.where(valid, frequency, 0)
    entry = frequency | ((tl.cumsum(frequency, 0) - frequency) << 16)
    tl.store(entries_ptr + symbol, entry.to(tl.uint32))
    return valid


@triton.jit
def expand_kernel(entries_ptr, slots_ptr, BLOCK: tl.constexpr):
    """Entries uint32 (256,) to the decoder's slots uint32 (4096,): symbol | frequency - 1 << 8 | (slot - start) << 20.

    Grid: (4096 / BLOCK,). Looks for the first symbol that ends behind the slot, in eight halvings.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    symbol = tl.zeros([BLOCK], tl.int32)
    for level in tl.static_range(8):
        middle = symbol + (127 >> level)
        entry = tl.load(entries_ptr + middle).to(tl.int32)
        symbol = tl.where((entry & 0xFFFF) + (entry >> 16) <= slot, middle + 1, symbol)
    entry = tl.load(entries_ptr + symbol).to(tl.int32)
    offset = (slot - (entry >> 16)) & 4095
    value = symbol | ((((entry & 0xFFFF) - 1) & 4095) << 8)
    tl.store(slots_ptr + slot, value.to(tl.uint32) | (offset.to(tl.uint32) << 20))
