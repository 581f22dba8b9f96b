"""Scales and steps: a block's step from its rms, the relative step from the rate asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference.block_grid import BLOCK_VALUES, BlockGrid
from efficient_dl.codec.kernels.reference.symbols import Mode
from efficient_dl.codec.steps import FIRST_STEP_INDEX, LAST_STEP_INDEX, STEPS, index_without_sample

NONFINITE_CODE = 255
# A scale of its own is most of what a tiny block is: with a coarse step its few values would round to zero, always.
TINY_BLOCK_VALUES = 16
TINY_BLOCK_STEP = 2.0**-4
_MAX_Q = 32767
_ACCUMULATORS = 16
_SAMPLE_BLOCKS = 64
_MIN_SAMPLE_BLOCKS = 8
_MIN_SAMPLE_VALUES = 64  # in shorter blocks the unused lanes cost as much as the values
_SCALE_BITS_PER_BLOCK = 8
_STATE_BITS_PER_ROW = 4


@dataclass
class Quantized:
    """q: int64 (blocks, 256). code: int64 (blocks,), the absolute step code. nonfinite, empty: bool (blocks,)."""

    q: Tensor
    code: Tensor
    nonfinite: Tensor
    empty: Tensor


def quantize(blocks: Tensor, grid: BlockGrid, relative_step: float) -> Quantized:
    """Quantizes float32 blocks (num_blocks, 256) with the step relative_step * rms of each block.

    Blocks of at most 16 values have a step of at most rms / 16.
    """
    exponent, nonfinite, vanishing = _exponents(blocks)
    safe = torch.where((nonfinite | vanishing)[:, None], 0, blocks)
    factor = ((254 - exponent).clamp(min=1) << 23).to(torch.int32).view(torch.float32)
    squares = (safe * factor[:, None]).square_().view(-1, BLOCK_VALUES // _ACCUMULATORS, _ACCUMULATORS)
    total = torch.zeros_like(squares[:, 0])
    for group in range(squares.shape[1]):
        total = total + squares[:, group]
    for width in (8, 4, 2, 1):
        total = total[:, :width] + total[:, width : 2 * width]
    tiny = grid.lengths <= TINY_BLOCK_VALUES
    factor = torch.where(tiny, min(relative_step, TINY_BLOCK_STEP), relative_step)
    scale = (total[:, 0] / grid.lengths.to(torch.float32)).sqrt() * factor
    rounded = (scale.view(torch.int32).to(torch.int64) + (1 << 20)) >> 21
    code = (rounded + 4 * (exponent - 127)).clamp(4, 1007)
    inverse = 1.0 / step_of(code)
    q = (safe * inverse[:, None]).round().clamp(-_MAX_Q, _MAX_Q).to(torch.int64)
    return Quantized(q, code, nonfinite, ~nonfinite & (vanishing | (q == 0).all(1)))


def step_of(code: Tensor) -> Tensor:
    """The step that an absolute code stands for: a float32 with two mantissa bits."""
    return (code << 21).to(torch.int32).view(torch.float32)


def choose_step(blocks: Tensor, grid: BlockGrid, mode: Mode, bits_q16: int) -> int:
    """The index of the finest relative step that keeps a sample of the blocks within bits_q16 / 65536 bits a value."""
    stride = max(1, grid.num_blocks // _SAMPLE_BLOCKS)
    _, nonfinite, vanishing = _exponents(blocks[::stride])
    long_enough = grid.lengths[::stride] >= _MIN_SAMPLE_VALUES
    chosen = (long_enough & ~(nonfinite | vanishing)).nonzero()[:, 0] * stride
    if chosen.numel() < _MIN_SAMPLE_BLOCKS:
        return index_without_sample(bits_q16)
    sample, sample_grid = blocks[chosen], grid.select(chosen)
    value_bits = int(sample_grid.lengths.sum()) * bits_q16
    available = value_bits - chosen.numel() * (_SCALE_BITS_PER_BLOCK << 16)
    low, high = FIRST_STEP_INDEX, LAST_STEP_INDEX
    while low < high:
        middle = (low + high) // 2
        quantized = quantize(sample, sample_grid, STEPS[middle - FIRST_STEP_INDEX])
        symbols, escaped = mode.symbols(quantized.q[~quantized.empty])
        cost = _cost_q16(symbols, mode) + int(escaped.sum()) * (8 * mode.escape_bytes << 16)
        budget = max(value_bits // 2, available - symbols.shape[0] * (_STATE_BITS_PER_ROW << 16))
        low, high = (low, middle) if cost <= budget else (middle + 1, high)
    return low


def _exponents(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exponent = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1).to(torch.int64) >> 23
    return exponent, exponent >= 253, exponent == 0


def _cost_q16(symbols: Tensor, mode: Mode) -> int:
    counts = torch.bincount(symbols.view(-1), minlength=mode.alphabet)
    counts = counts[counts > 0]
    if not counts.numel():
        return 0
    logarithms = log2_q16(torch.cat([counts.sum(0, keepdim=True), counts]))
    return int((counts * (logarithms[0] - logarithms[1:])).sum())


def log2_q16(n: Tensor) -> Tensor:
    """log2 of positive integers below 2**31 with 16 fraction bits, rounded down, in integer arithmetic."""
    integer = torch.zeros_like(n)
    for bit in (16, 8, 4, 2, 1):
        integer = integer + bit * ((n >> (integer + bit)) > 0)
    mantissa = n << (30 - integer)
    result = integer
    for _ in range(16):
        mantissa = (mantissa * mantissa) >> 30
        carry = mantissa >> 31
        mantissa = mantissa >> carry
        result = result << 1 | carry
    return result
