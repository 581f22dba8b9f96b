"""How the exact codec's GPU kernels cut a value into symbol and bytes, and what they can decode into (docs/format.md).

All of it works on the values' bits in integers: the interpreter and the GPUs then agree to the bit.
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Kernels take numbers where they say tl.constexpr, and tl.static_range is no iterator.)
from __future__ import annotations

import triton
import triton.language as tl

BLOCK_VALUES = tl.constexpr(256)
TILE_BLOCKS = tl.constexpr(128)
TILE_VALUES = tl.constexpr(32768)
ESCAPE = tl.constexpr(255)
CENTRE = tl.constexpr(96)  # the symbol of the reference exponent itself

# A coded tile's info: bit 0, the modes of planes 1 and 2, the number of escapes.
MODES_SHIFT = tl.constexpr(8)
ESCAPES_SHIFT = tl.constexpr(12)

# The dtype codes of the packet's header, as compile-time arguments.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
FLOAT8_E4M3FN = tl.constexpr(3)


@triton.jit
def load_bits(values_ptr, index, mask, WIDTH: tl.constexpr):
    """The bits of values of WIDTH bytes as int32, 0 where mask is not set. values_ptr: int32, int16 or uint8."""
    bits = tl.load(values_ptr + index, mask=mask, other=0).to(tl.int32)
    if WIDTH == 2:
        bits = bits & 0xFFFF
    return bits


@triton.jit
def load_inside(values_ptr, index, remaining, WHOLE: tl.constexpr, WIDTH: tl.constexpr):
    """`load_bits` of the values in front of `remaining`, of which there are at most WHOLE: mostly that many.

    Without a mask a thread loads its values with one instruction.
    """
    if remaining == WHOLE:
        bits = tl.load(values_ptr + index).to(tl.int32)
    else:
        bits = tl.load(values_ptr + index, mask=index < remaining, other=0).to(tl.int32)
    if WIDTH == 2:
        bits = bits & 0xFFFF
    return bits


@triton.jit
def typed(bytes_ptr, WIDTH: tl.constexpr):
    """A pointer to bytes as one to values of WIDTH bytes."""
    if WIDTH == 4:
        values_ptr = bytes_ptr.to(tl.pointer_type(tl.int32))
    elif WIDTH == 2:
        values_ptr = bytes_ptr.to(tl.pointer_type(tl.int16))
    else:
        values_ptr = bytes_ptr
    return values_ptr


@triton.jit
def upper_half(bits, WIDTH: tl.constexpr):
    """The 16 bits that hold sign and exponent."""
    if WIDTH == 4:
        upper = (bits >> 16) & 0xFFFF
    else:
        upper = bits
    return upper


@triton.jit
def exponents(bits, WIDTH: tl.constexpr):
    """The eight bits behind the sign; 0 for zeros."""
    return (upper_half(bits, WIDTH) >> 7) & 255


@triton.jit
def symbols(bits, reference, WIDTH: tl.constexpr):
    """Symbols of values in blocks with these reference exponents, int32."""
    if WIDTH == 1:
        symbol = bits
    else:
        distance = exponents(bits, WIDTH) - reference + CENTRE
        symbol = tl.where((distance >= 1) & (distance < ESCAPE), distance, ESCAPE)
        symbol = tl.where(bits == 0, 0, symbol)
    return symbol


@triton.jit
def top_bytes(bits, WIDTH: tl.constexpr):
    """Plane 0: the sign and the seven bits behind the exponent."""
    upper = upper_half(bits, WIDTH)
    return ((upper >> 8) & 0x80) | (upper & 0x7F)


@triton.jit
def plane_bytes(bits, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """The byte of plane 0, 1 or 2."""
    if PLANE == 0:
        byte = top_bytes(bits, WIDTH)
    else:
        byte = (bits >> (16 - 8 * PLANE)) & 255
    return byte


@triton.jit
def join(symbol, reference, top, low, WIDTH: tl.constexpr):
    """The inverse of `symbols` and `top_bytes` for values that are no escapes. low: float32's lower 16 bits."""
    if WIDTH == 1:
        bits = symbol
    else:
        exponent = (symbol + reference - CENTRE) & 255
        bits = ((top & 0x80) << 8) | (exponent << 7) | (top & 0x7F)
        if WIDTH == 4:
            bits = (bits << 16) | low
        bits = tl.where(symbol == 0, 0, bits)
    return bits


@triton.jit
def place_blocks(starts_ptr, sent, at, mask, WIDTH: tl.constexpr):
    """Stores where the bytes of a tile's blocks begin, -1 if there are none; returns where the last one's end.

    sent: int32 (128,), values of WIDTH bytes that each block has there. at: int32, where the first one begins.
    """
    start = at + WIDTH * (tl.cumsum(sent, 0) - sent)
    tl.store(starts_ptr + tl.arange(0, TILE_BLOCKS), tl.where(sent > 0, start, -1), mask=mask)
    return at + WIDTH * tl.sum(sent, 0)


@triton.jit
def to_float(bits, DTYPE: tl.constexpr):
    """Values of dtype code DTYPE as float32; exact."""
    if DTYPE == FLOAT32:
        value = bits.to(tl.float32, bitcast=True)
    elif DTYPE == BFLOAT16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE == FLOAT16:
        value = _half_to_float(bits)
    elif DTYPE == FLOAT8_E4M3FN:
        # As the bits of a half-precision number, whose exponent's bias is larger by eight.
        value = _half_to_float(((bits & 0x80) << 8) | ((bits & 0x7F) << 7)) * 256.0
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    else:
        value = _half_to_float(bits << 8)
    return value


@triton.jit
def _half_to_float(bits):
    magnitude = bits & 0x7FFF
    normal = (magnitude << 13) + (112 << 23)
    normal = tl.where(magnitude >= 0x7C00, normal + (112 << 23), normal)
    # Below the normal numbers: a multiple of 2^-24.
    tiny = (magnitude.to(tl.float32) * 5.9604644775390625e-08).to(tl.int32, bitcast=True)
    value = tl.where(magnitude < 0x400, tiny, normal) | ((bits & 0x8000) << 16)
    return value.to(tl.float32, bitcast=True)


@triton.jit
def from_float(value, DTYPE: tl.constexpr):
    """float32 rounded to dtype code DTYPE, half to even, as bits; too large a number becomes what torch makes of it."""
    bits = value.to(tl.int32, bitcast=True)
    if DTYPE == FLOAT32:
        result = bits
    else:
        magnitude = bits & 0x7FFFFFFF
        sign = (bits >> 31) & 1
        if DTYPE == BFLOAT16:
            rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
            rounded = tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
            result = (sign << 15) | rounded
        elif DTYPE == FLOAT16:
            rounded = _round_small(magnitude, 13, 112, 126)
            rounded = tl.where(magnitude >= 0x477FF000, 0x7C00, rounded)
            rounded = tl.where(magnitude > 0x7F800000, 0x7E00, rounded)
            result = (sign << 15) | rounded
        elif DTYPE == FLOAT8_E4M3FN:
            rounded = _round_small(magnitude, 20, 120, 141)
            # There is no infinity: 464 and more become the largest number, 448.
            rounded = tl.where(magnitude >= 0x43E80000, 0x7E, rounded)
            rounded = tl.where(magnitude > 0x7F800000, 0x7F, rounded)
            result = (sign << 7) | rounded
        else:
            rounded = _round_small(magnitude, 21, 112, 134)
            rounded = tl.where(magnitude >= (143 << 23), 0x7C, rounded)
            rounded = tl.where(magnitude > 0x7F800000, 0x7F, rounded)
            result = (sign << 7) | rounded
    return result


@triton.jit
def _round_small(magnitude, DROPPED: tl.constexpr, BIAS: tl.constexpr, ALIGNING: tl.constexpr):
    """Bits of a float32 without its sign, rounded to a format that has DROPPED bits less and an exponent BIAS lower.

    Numbers below the format's normal ones are rounded by adding the power of two of exponent ALIGNING, whose last bit
    is worth the format's smallest number.
    """
    below_half: tl.constexpr = (1 << (DROPPED - 1)) - 1
    rounded = (magnitude - (BIAS << 23) + below_half + ((magnitude >> DROPPED) & 1)) >> DROPPED
    aligning = tl.full(magnitude.shape, ALIGNING << 23, tl.int32).to(tl.float32, bitcast=True)
    tiny = (magnitude.to(tl.float32, bitcast=True) + aligning).to(tl.int32, bitcast=True) - (ALIGNING << 23)
    return tl.where(magnitude < ((BIAS + 1) << 23), tiny, rounded)
