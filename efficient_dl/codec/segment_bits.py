"""What each parameter of a packet costs: its own order-0 entropy, and its share of what the codec's model takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.codec.contract import Codec, PacketStats, Side
from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference import contexts, grid, tables
from efficient_dl.codec.kernels.reference.block_grid import BLOCK_VALUES, BlockGrid
from efficient_dl.codec.kernels.reference.block_scale import quantize
from efficient_dl.codec.kernels.reference.symbols import MAX_PAIR_BITS, PAIRS, SINGLES

SAMPLE_BLOCKS = 32  # of each segment: 8,192 values tell an entropy to about 0.01 bits
_LARGEST = 127  # integers beyond count as one, as in `PacketStats.order0_bits`


@dataclass(frozen=True)
class SegmentBits:
    """What so many sampled values of a segment are worth, in bits for all of them, as in `PacketStats`."""

    numel: int
    order0_bits: float
    model_bits: float


def segment_bits(
    codec: Codec, x: Tensor, segments: tuple[int, ...], stats: PacketStats, turn: int = 0
) -> list[SegmentBits]:
    """Measures the entropies of each segment of a packet on at most 32 blocks of it.

    x: the values that were encoded, 1-D. stats: of their packet. turn: which of a long segment's blocks are taken.

    "bits:RATE": with the packet's relative step and one table for all segments. "grid:RATE": with the packet's step and
    a segment's own tables, blocks' classes included. Other codecs: as if the sample were a packet of its own. Waits
    for a GPU.
    """
    parts = [_sample(part, turn) for part in x.split_with_sizes(segments)]
    family, _, rate = codec.name.partition(":")
    if family == "bits":
        return _block_bits(parts, segments, float(rate), stats.relative_step)
    if family == "grid":
        return [_grid_bits(part.float(), stats.step_size) for part in parts]
    room = torch.empty(codec.max_bytes(max(map(len, parts)), x.dtype), dtype=torch.uint8, device=x.device)
    found: list[SegmentBits] = []
    for part in parts:
        own = PacketStats()
        codec.encode_into(part, room, Side((part.numel(),)), own)
        found.append(SegmentBits(part.numel(), own.order0_bits, own.model_bits))
    return found


def _sample(part: Tensor, turn: int) -> Tensor:
    """Whole blocks, evenly apart; all values of a short segment."""
    stride = part.numel() // (SAMPLE_BLOCKS * BLOCK_VALUES)
    if stride < 2:
        return part
    blocks = part[: part.numel() // BLOCK_VALUES * BLOCK_VALUES].view(-1, BLOCK_VALUES)
    return blocks[turn % stride :: stride].reshape(-1)


def _grid_bits(part: Tensor, step_size: float) -> SegmentBits:
    blocks = BlockGrid((len(part),), part.device)
    values = blocks.gather(part)
    finite = values.abs().amax(1) < grid.SMALLEST_HUGE
    q, lengths = grid.quantize(values[finite], step_size), blocks.lengths[finite]
    counted = q[blocks.mask[finite]].clamp(-_LARGEST, _LARGEST) + _LARGEST
    cost_q16 = contexts.cost_q16(q, lengths, grid.ESCAPE_BYTES) if len(q) else 0
    return SegmentBits(len(part), order0_bits(torch.bincount(counted)), cost_q16 / 65536)


def _block_bits(
    parts: list[Tensor], segments: tuple[int, ...], rate: float, relative_step: float
) -> list[SegmentBits]:
    mode = PAIRS if rate <= MAX_PAIR_BITS else SINGLES
    device = parts[0].device
    blocks = BlockGrid(tuple(map(len, parts)), device)
    quantized = quantize(blocks.gather(torch.cat(parts).float()), blocks, relative_step)
    coded = ~quantized.nonfinite & ~quantized.empty
    num_blocks = torch.tensor([-(-len(part) // BLOCK_VALUES) for part in parts], device=device)
    owner = torch.arange(len(parts), device=device).repeat_interleave(num_blocks)[coded]
    q = quantized.q[coded]
    symbols, escaped = mode.symbols(q)
    rows = owner.repeat_interleave(mode.rows_per_block)
    counts = _counts(symbols, rows, mode.alphabet, len(parts))
    integers = _counts(q.clamp(-_LARGEST, _LARGEST) + _LARGEST, owner, 2 * _LARGEST + 1, len(parts))
    escapes = torch.bincount(rows, escaped.sum(1), minlength=len(parts)) * 8 * mode.escape_bytes
    weights = [max(whole // max(len(part), 1), 1) for whole, part in zip(segments, parts, strict=True)]
    together = (counts * torch.tensor(weights, device=device)[:, None]).sum(0)
    frequency = tables.normalize(together) if q.numel() else together
    return [
        SegmentBits(len(part), order0_bits(values), model_bits(own, frequency) + float(extra))
        for part, values, own, extra in zip(parts, integers, counts, escapes, strict=True)
    ]


def _counts(symbols: Tensor, owner: Tensor, alphabet: int, owners: int) -> Tensor:
    """int64 (owners, alphabet): how often each owner's rows hold each symbol."""
    place = symbols + alphabet * owner[:, None]
    return torch.bincount(place.view(-1), minlength=owners * alphabet).view(owners, alphabet)
