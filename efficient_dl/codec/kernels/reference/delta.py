"""The exact delta in torch: distances to a reference in units in the last place (docs/format.md, codec 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.kernels.reference import contexts, split
from efficient_dl.codec.kernels.reference.block_grid import BlockGrid
from efficient_dl.codec.kernels.reference.context_classes import NONFINITE_CLASS
from efficient_dl.codec.kernels.reference.wire import Reader, pad4, to_bytes
from efficient_dl.errors import CorruptPacket

RUN_VALUES = 65536
MAX_PLANES = {4: 2, 2: 1, 1: 0}  # by the dtype's bytes
_INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
_ONE_BIT = 65536


def encode(x: Tensor, reference: Tensor, stats: PacketStats | None) -> Tensor:
    """Returns the body of a packet, uint8. x, reference: 1-D, of one dtype."""
    width = x.dtype.itemsize
    grid = BlockGrid((x.numel(),), x.device)
    distance = _wrapped(_ordinal(x) - _ordinal(reference), 8 * width)[_order(reference)]
    blocks = grid.gather(distance)
    planes = _choose_planes(blocks, grid, width)
    q = _quotient(blocks, planes)
    finite = torch.zeros(grid.num_blocks, dtype=torch.bool, device=x.device)
    measured = None if stats is None else PacketStats()
    body = torch.cat(
        [
            to_bytes(torch.tensor([planes << 8], device=x.device), 4),
            contexts.encode(q, finite, grid, max(width, 2), measured),
            pad4(torch.cat([x.new_empty(0, dtype=torch.uint8), *_planes(distance, planes)])),
        ]
    )
    if measured is not None:
        measured.header_bits += 32
        measured.model_bits += 8 * planes * x.numel()
        measured.order0_bits += 8 * planes * x.numel()
    tensor_bytes = width * x.numel()
    zeros = int((_signed(x) == 0).sum())
    if width == 1 or 8 * body.numel() > tensor_bytes or 2 * zeros > x.numel():
        lossless_stats = None if stats is None else PacketStats()
        lossless = split.encode(x, lossless_stats)
        if 4 + lossless.numel() < body.numel():
            body = torch.cat([to_bytes(torch.tensor([1], device=x.device), 4), lossless])
            measured = lossless_stats
            if measured is not None:
                measured.header_bits += 32
    if stats is not None and measured is not None:
        stats.__dict__.update(measured.__dict__)
    return body


def decode(body: Tensor, reference: Tensor) -> Tensor:
    """Returns the decoded values, of the reference's dtype; raises `CorruptPacket`."""
    reader = Reader(body)
    (head,) = reader.integers(1, 4)
    width = reference.dtype.itemsize
    if head == 1:
        return split.decode(reader.take(reader.remaining), reference.dtype, reference.numel())
    planes = head >> 8
    if head & 0xFF or planes > MAX_PLANES[width]:
        raise CorruptPacket(
            "unknown method of a delta",
            expected=f"method 0 with at most {MAX_PLANES[width]} planes, or 1",
            found=f"{head:08x}",
        )
    grid = BlockGrid((reference.numel(),), reference.device)
    q, classes = contexts.decode(reader, grid, max(width, 2), body.device)
    if bool((classes == NONFINITE_CLASS).any()):
        raise CorruptPacket("a block of a delta is said to be not finite")
    distance = grid.scatter(q) << (8 * planes)
    low = torch.zeros_like(distance)
    for _ in range(planes):
        low = low << 8 | reader.take(distance.numel()).to(torch.int64)
    if planes:
        reader.align4()
        distance = distance + _wrapped(low, 8 * planes)
    reader.end()
    moved = torch.empty_like(distance)
    moved[_order(reference)] = distance
    ordinal = _wrapped(_ordinal(reference) + moved, 8 * width)
    bits = _reordered(ordinal, 8 * width)
    return bits.to(_INTEGERS[width]).view(reference.dtype)


def _order(reference: Tensor) -> Tensor:
    """Where the values to be coded first, second, ... lie: by the reference's exponent within each run."""
    bits = _signed(reference)
    key = {4: bits >> 23, 2: bits >> 7, 1: bits & 0x7F}[reference.dtype.itemsize] & 0xFF
    run = torch.arange(reference.numel(), device=reference.device) // RUN_VALUES
    return torch.sort(run << 8 | key, stable=True).indices


def _signed(x: Tensor) -> Tensor:
    return x.view(_INTEGERS[x.dtype.itemsize]).to(torch.int64)


def _reordered(bits: Tensor, width: int) -> Tensor:
    # Its own inverse: negative values in the order of their size.
    return torch.where(bits < 0, bits ^ ((1 << (width - 1)) - 1), bits)


def _ordinal(x: Tensor) -> Tensor:
    return _reordered(_signed(x), 8 * x.dtype.itemsize)


def _wrapped(values: Tensor, width: int) -> Tensor:
    half = 1 << (width - 1)
    return ((values + half) & ((1 << width) - 1)) - half


def _quotient(distance: Tensor, planes: int) -> Tensor:
    return (distance + (1 << (8 * planes - 1))) >> (8 * planes) if planes else distance


def _planes(distance: Tensor, planes: int) -> list[Tensor]:
    return [((distance >> (8 * p)) & 0xFF).to(torch.uint8) for p in range(planes - 1, -1, -1)]


def _choose_planes(blocks: Tensor, grid: BlockGrid, width: int) -> int:
    chosen = contexts.sample_of(grid.num_blocks, blocks.device)
    sample, lengths = blocks[chosen], grid.lengths[chosen]
    values = int(lengths.sum())
    costs = [
        contexts.cost_q16(_quotient(sample, p), lengths, max(width, 2)) + 8 * p * _ONE_BIT * values
        for p in range(MAX_PLANES[width] + 1)
    ]
    return costs.index(min(costs))
