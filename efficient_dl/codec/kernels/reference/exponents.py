"""The exact codec's view of values: a reference exponent a block, the distance from it, and raw bytes (codec 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference.wire import from_bytes, to_bytes

BLOCK_VALUES = 256
ESCAPE = 255
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_CENTRE = 96  # the symbol of the reference exponent itself
_SAMPLE_BLOCKS = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Fields:
    """A tensor in blocks of 256 values, zeros behind its end.

    codes: int64 (B,). The others are (B, 256): symbols, int64; kept, bool: values with bytes in the planes; escaped,
    bool: values that are sent apart; values: their bits, int64. planes: int64 each; none for float8.
    """

    codes: Tensor
    symbols: Tensor
    kept: Tensor
    escaped: Tensor
    values: Tensor
    planes: list[Tensor]


def num_planes(dtype: torch.dtype) -> int:
    """Raw bytes of a value of dtype that has a symbol."""
    return {1: 0, 2: 1, 4: 3}[dtype.itemsize]


def split(x: Tensor) -> Fields:
    """x: 1-D, not empty, of any dtype that packets have."""
    v = _bits(x)
    if x.dtype in FLOAT8_DTYPES:
        nothing = torch.zeros_like(v, dtype=torch.bool)
        return Fields((v != 0).any(1).to(torch.int64), v, nothing, nothing, v, [])
    upper = v >> 16 if x.dtype == torch.float32 else v
    exponent, nonzero = upper >> 7 & 0xFF, v != 0
    codes = _reference_exponents(exponent, nonzero.sum(1))
    distance = exponent - codes[:, None] + _CENTRE
    escaped = nonzero & ((distance < 1) | (distance >= ESCAPE))
    symbols = torch.where(nonzero, torch.where(escaped, ESCAPE, distance), 0)
    planes = [upper >> 8 & 0x80 | upper & 0x7F]
    if x.dtype == torch.float32:
        planes += [v >> 8 & 0xFF, v & 0xFF]
    return Fields(codes, symbols, nonzero & ~escaped, escaped, v, planes)


def merge(
    symbols: Tensor, codes: Tensor, planes: list[Tensor], escapes: Tensor, dtype: torch.dtype
) -> Tensor:
    """The values of blocks: bytes, uint8 (blocks * 256 * itemsize,).

    symbols: int64 (B, 256). codes: int64 (B,). planes: int64 (B, 256) each, with zeros where nothing was sent.
    escapes: uint8, the bytes of as many values as there are escapes among the symbols.
    """
    if dtype in FLOAT8_DTYPES:
        return symbols.reshape(-1).to(torch.uint8)
    exponent = symbols + codes[:, None] - _CENTRE & 0xFF
    v = (planes[0] & 0x80) << 8 | exponent << 7 | planes[0] & 0x7F
    if dtype == torch.float32:
        v = v << 16 | planes[1] << 8 | planes[2]
    v = torch.where(symbols == 0, 0, v)
    v[symbols == ESCAPE] = from_bytes(escapes, dtype.itemsize)
    return to_bytes(v, dtype.itemsize)


def _bits(x: Tensor) -> Tensor:
    integers = x.view(_INTEGERS[x.dtype.itemsize]).to(torch.int64) & ((1 << 8 * x.dtype.itemsize) - 1)
    blocks = torch.zeros(-(-x.numel() // BLOCK_VALUES) * BLOCK_VALUES, dtype=torch.int64, device=x.device)
    blocks[: x.numel()] = integers
    return blocks.view(-1, BLOCK_VALUES)


def _reference_exponents(exponent: Tensor, count: Tensor) -> Tensor:
    """exponent: (B, 256), 0 for zeros. count: (B,), the values that are no zeros. Returns int64 (B,)."""
    total = exponent.sum(1)
    stride = max(1, total.numel() // _SAMPLE_BLOCKS)
    sample_count = count[::stride].sum()
    tensor_mean = 256 * total[::stride].sum() // sample_count.clamp(min=1)
    mean = 256 * total // count.clamp(min=1)
    code = (mean - tensor_mean + 128 >> 8) + (tensor_mean >> 8)
    return torch.where(count > 0, code.clamp(1, 255), 0)
