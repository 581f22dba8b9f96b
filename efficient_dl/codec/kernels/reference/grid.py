"""The grid quantizer in torch: one step for the whole tensor, a dead zone, contexts (docs/format.md, codec 3)."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.kernels.reference import contexts
from efficient_dl.codec.kernels.reference.block_grid import BlockGrid
from efficient_dl.codec.kernels.reference.context_classes import NONFINITE_CLASS
from efficient_dl.codec.kernels.reference.wire import Reader, to_bytes
from efficient_dl.codec.steps import COARSEST_GRID_STEP, FINEST_GRID_STEP, grid_step
from efficient_dl.errors import CorruptPacket

ESCAPE_BYTES = 2
_MAX_Q = 32767.0
_ROUNDING = 0.375  # less than one half: a dead zone of 1.25 steps
_FIRST_HUGE_BITS = 253 << 23
SMALLEST_HUGE = 2.0**126  # blocks with such values, or with NaN, are not quantized
_OCTAVE = 32  # steps
# Of the searched range, from the largest sampled value's power of two; four times that value still has an integer.
_FINEST, _COARSEST = -12 * _OCTAVE, 2 * _OCTAVE


def encode(
    x: Tensor, grid: BlockGrid, bits_q16: int, step_size: float | None, stats: PacketStats | None
) -> Tensor:
    """Returns the body of a packet, uint8. x: float32, 1-D. step_size: instead of the rate."""
    blocks = grid.gather(x)
    nonfinite = _magnitude_bits(blocks) >= _FIRST_HUGE_BITS
    step = _choose_step(blocks, nonfinite, grid, bits_q16) if step_size is None else step_size
    q = quantize(torch.where(nonfinite[:, None], 0, blocks), step)
    body = contexts.encode(q, nonfinite, grid, ESCAPE_BYTES, stats)
    (step_bits,) = struct.unpack("<I", struct.pack("<f", step))
    if stats is not None:
        stats.header_bits += 32
        stats.step_size = step
    return torch.cat([to_bytes(torch.tensor([step_bits], device=x.device), 4), body])


def decode(body: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Returns the decoded values, float32 1-D, and which of them lie in blocks that are not empty, bool."""
    reader = Reader(body)
    (step_bits,) = reader.integers(1, 4)
    (step,) = struct.unpack("<f", struct.pack("<I", step_bits))
    if not 2.0**-126 <= step < 2.0**100:
        raise CorruptPacket("the step is out of range", expected="2^-126 to 2^100", found=str(step))
    q, classes = contexts.decode(reader, grid, ESCAPE_BYTES, body.device)
    reader.end()
    values = q.to(torch.float32) * step
    values[classes == NONFINITE_CLASS] = torch.nan
    return grid.scatter(values), grid.scatter((classes > 0)[:, None].expand(-1, values.shape[1]))


def quantize(blocks: Tensor, step: float) -> Tensor:
    """int64 of the same shape. blocks: float32, magnitudes below 2^126."""
    inverse = 1.0 / blocks.new_tensor(step)
    magnitude = (blocks.abs() * inverse + _ROUNDING).floor().clamp(max=_MAX_Q).to(torch.int64)
    return torch.where(blocks < 0, -magnitude, magnitude)


def _choose_step(blocks: Tensor, nonfinite: Tensor, grid: BlockGrid, bits_q16: int) -> float:
    chosen = contexts.sample_of(grid.num_blocks, blocks.device)
    chosen = chosen[~nonfinite[chosen]]
    sample, lengths = blocks[chosen], grid.lengths[chosen]
    largest = int(_magnitude_bits(sample).max()) if sample.numel() else 0
    is_sampled = largest > 0
    if not is_sampled:  # nearly all blocks are zeros: at any rate there are bits for the others
        largest = int(_magnitude_bits(blocks[~nonfinite]).amax()) if not bool(nonfinite.all()) else 0
    if largest == 0:
        return 1.0
    octave = _OCTAVE * ((largest >> 23) - 127)
    low = min(max(octave + _FINEST, FINEST_GRID_STEP), COARSEST_GRID_STEP)
    high = min(max(octave + _COARSEST, FINEST_GRID_STEP), COARSEST_GRID_STEP) if is_sampled else low
    budget = int(lengths.sum()) * bits_q16
    while low < high:
        middle = (low + high) // 2
        cost = contexts.cost_q16(quantize(sample, grid_step(middle)), lengths, ESCAPE_BYTES)
        low, high = (low, middle) if cost <= budget else (middle + 1, high)
    return grid_step(low)


def _magnitude_bits(blocks: Tensor) -> Tensor:
    return (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1).to(torch.int64)
