"""The codes of a coded tile's blocks on a GPU, as many bits each as their range needs (docs/format.md, codec 1)."""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Kernels take numbers where they say tl.constexpr, and tl.static_range is no iterator.)
from __future__ import annotations

import triton
import triton.language as tl

HEAD_BYTES = tl.constexpr(4)
_LARGEST = tl.constexpr(255)
_LARGEST_WIDTH = tl.constexpr(8)


@triton.jit
def width_of(head):
    """Bits of a field."""
    return (head >> 8) & 255


@triton.jit
def section_bytes(head, count):
    """Bytes of the section of `count` blocks."""
    return (count * width_of(head) + 31) // 32 * 4 + HEAD_BYTES


@triton.jit
def choose_head(code, inside):
    """The first four bytes, as one int32, of the section of a tile. code: int32 (128,). inside: blocks it has."""
    low = tl.min(tl.where(inside & (code > 0), code, _LARGEST), 0)
    high = tl.max(tl.where(inside, code, 0), 0)
    empty = tl.max((inside & (code == 0)).to(tl.int32), 0)
    largest = tl.maximum(high - low + empty, 0)
    width = tl.zeros([], tl.int32)
    for bit in tl.static_range(_LARGEST_WIDTH):
        width += ((largest >> bit) > 0).to(tl.int32)
    return low | (width << 8) | (empty << 16)


@triton.jit
def store_codes(target_ptr, codes_ptr, head, count):
    """Writes the section. target_ptr: uint8, the tile. codes_ptr: uint8, of the tile's `count` blocks."""
    width = width_of(head)
    group = tl.arange(0, 16)[:, None]
    place = tl.arange(0, 8)[None, :]
    member = group * 8 + place
    code = tl.load(codes_ptr + member, mask=member < count, other=0).to(tl.int32)
    field = tl.where(code > 0, code - (head & 255) + (head >> 16), 0)
    # Eight fields are `width` bytes; those behind the last block are zero, and so is the padding.
    together = tl.sum(field.to(tl.uint64) << (place * width).to(tl.uint64), 1)[:, None]
    byte = ((together >> (8 * place).to(tl.uint64)) & 255).to(tl.uint8)
    at = group * width + place + HEAD_BYTES
    tl.store(target_ptr + at, byte, mask=(place < width) & (at < section_bytes(head, count)))
    head_place = tl.arange(0, 4)
    tl.store(target_ptr + head_place, ((head >> (8 * head_place)) & 255).to(tl.uint8))


@triton.jit
def load_code(tile_ptr, head, block):
    """The code of one block. Reads up to a byte behind the fields, where the states are."""
    bit = block * width_of(head)
    at_ptr = tile_ptr + HEAD_BYTES + (bit >> 3)
    pair = tl.load(at_ptr).to(tl.int32) | (tl.load(at_ptr + 1).to(tl.int32) << 8)
    return _cut(pair, bit, head)


@triton.jit
def load_codes(tile_ptr, head, member, mask):
    """The same of several blocks, 0 where mask is not set. member: int32 (blocks,)."""
    bit = member * width_of(head)
    at_ptr = tile_ptr + HEAD_BYTES + (bit >> 3)
    pair = tl.load(at_ptr, mask=mask, other=0).to(tl.int32)
    pair |= tl.load(at_ptr + 1, mask=mask, other=0).to(tl.int32) << 8
    return tl.where(mask, _cut(pair, bit, head), 0)


@triton.jit
def _cut(pair, bit, head):
    field = (pair >> (bit & 7)) & ((1 << width_of(head)) - 1)
    empty = head >> 16
    return tl.where((field == 0) & (empty == 1), 0, (head & 255) + field - empty)


@triton.jit
def head_is_sound(head):
    """Whether these four bytes can begin a section."""
    return ((head & 255) > 0) & (width_of(head) <= _LARGEST_WIDTH) & ((head >> 17) == 0)


@triton.jit
def codes_are_sound(tile_ptr, head, code, count):
    """Whether the codes are in range, and what lies behind the last is zero. code: int32, 0 behind the last."""
    used = count * width_of(head)
    word = tl.load((tile_ptr + section_bytes(head, count) - 4).to(tl.pointer_type(tl.uint32)))
    behind = tl.where((used & 31) != 0, word >> (used & 31).to(tl.uint32), 0)
    return (tl.max(code, 0) <= _LARGEST) & (behind == 0)
