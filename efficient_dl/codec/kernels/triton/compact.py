"""From tiles in slots of their own to one packet: the scan over their sizes and the copies."""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

# Large enough that no sum of tile sizes reaches it: for packets without a capacity.
NO_LIMIT = tl.constexpr(1 << 62)


@triton.jit
def scan_tiles(sizes_ptr, offsets_ptr, num_tiles, limit, CHUNK: tl.constexpr):
    """Exclusive prefix sums over the tiles' bytes, by one program.

    sizes_ptr: int32 (num_tiles,). offsets_ptr: int64 (num_tiles,), relative to the first tile. limit: int64, the bytes
    that there is room for. Returns int64 scalars: the tiles before the first that does not fit, and their bytes.
    """
    total = tl.zeros([], tl.int64)
    kept = tl.zeros([], tl.int64)
    kept_bytes = tl.zeros([], tl.int64)
    for first in range(0, num_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        size = tl.load(sizes_ptr + tile, mask=tile < num_tiles, other=0).to(tl.int64)
        end = total + tl.cumsum(size, 0)
        tl.store(offsets_ptr + tile, end - size, mask=tile < num_tiles)
        fits = (end <= limit) & (tile < num_tiles)
        kept += tl.sum(fits.to(tl.int64), 0)
        kept_bytes += tl.sum(tl.where(fits, size, 0), 0)
        total += tl.sum(size, 0)
    return kept, kept_bytes


@triton.jit
def copy_words(target_ptr, source_ptr, num_words, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies 16-bit words to a 4-byte aligned place and pads them with zeros to a multiple of 4 bytes.

    target_ptr: int32. source_ptr: uint16, at any word. `part` of PARTS programs copies every PARTS-th block.
    """
    lane = tl.arange(0, BLOCK)
    for first in range(part * BLOCK, (num_words + 1) // 2, PARTS * BLOCK):
        pair = first + lane
        low = tl.load(source_ptr + 2 * pair, mask=2 * pair < num_words, other=0).to(tl.int32)
        high = tl.load(source_ptr + 2 * pair + 1, mask=2 * pair + 1 < num_words, other=0).to(tl.int32)
        tl.store(target_ptr + pair, low | (high << 16), mask=2 * pair < num_words)


@triton.jit
def copy_integers(target_ptr, source_ptr, count, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies int32 integers; `part` of PARTS programs copies every PARTS-th block."""
    lane = tl.arange(0, BLOCK)
    for first in range(part * BLOCK, count, PARTS * BLOCK):
        value = tl.load(source_ptr + first + lane, mask=first + lane < count, other=0)
        tl.store(target_ptr + first + lane, value, mask=first + lane < count)
