"""The reference kernels as body kernels: torch operations on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats, Side
from efficient_dl.codec.kernels.reference import block, contexts, delta, grid, split
from efficient_dl.codec.kernels.reference.block_grid import BLOCK_VALUES, BlockGrid, count_blocks
from efficient_dl.codec.kernels.reference.outputs import apply_rounded, apply_values
from efficient_dl.codec.kernels.reference.symbols import MAX_PAIR_BITS, PAIRS, SINGLES, Mode
from efficient_dl.codec.kernels.reference.tiles import LANES
from efficient_dl.codec.packet import byte_view, checked_reference
from efficient_dl.errors import CorruptPacket

_TABLE_BYTES = 416


class CopyBody:
    """The tensor's own bytes."""

    name = "copy"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """Exactly numel * itemsize."""
        return numel * dtype.itemsize

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        data = byte_view(x)
        body[: data.numel()].copy_(data)
        if stats is not None:
            stats.order0_bits = stats.model_bits = 8.0 * data.numel()
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        if body.numel() != out.numel() * dtype.itemsize:
            raise CorruptPacket(
                "an identity packet has the wrong length",
                expected=f"{out.numel() * dtype.itemsize} bytes of body",
                found=f"{body.numel()}",
            )
        if dtype == out.dtype and not accumulate:
            byte_view(out).copy_(body)
        else:
            # A packet may start anywhere in a receive buffer: clone, so that a typed view is aligned.
            apply_values(body.clone().view(dtype), out, accumulate)


class ReferenceSplit:
    """The exact codec (docs/format.md, codec 1)."""

    name = "reference"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored."""
        return split.max_bytes(numel, dtype)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        data = split.encode(x, stats)
        body[: data.numel()].copy_(data)
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        values = split.decode(body, dtype, out.numel())
        if accumulate or dtype != out.dtype:
            apply_values(values.view(dtype), out, accumulate)
        else:
            byte_view(out).copy_(values)


class ReferenceBlock:
    """The block quantizer (docs/format.md, codec 2) at a rate of `bits` a value."""

    name = "reference"

    def __init__(self, bits: float) -> None:
        self._bits_q16 = round(bits * 65536)
        self._mode = PAIRS if self._bits_q16 <= MAX_PAIR_BITS * 65536 else SINGLES

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped."""
        return largest_block_body(numel, num_segments, self._mode, self._bits_q16)

    def fixed_bytes(self, segments: tuple[int, ...]) -> int:
        """See `LossyBodyKernel.fixed_bytes`."""
        return block.fixed_bytes(count_blocks(segments), self._mode, self._bits_q16)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        return self.encode_lossy(x, segments, body, stats, None, None)

    def encode_lossy(
        self,
        x: Tensor,
        segments: tuple[int, ...],
        body: Tensor,
        stats: PacketStats | None,
        residual: Tensor | None,
        capacity: int | None,
    ) -> int:
        """See `LossyBodyKernel.encode_lossy`. The residual is what decoding the packet leaves over."""
        blocks = BlockGrid(segments, x.device)
        values = x.to(torch.float32)
        if residual is not None:
            values = values + residual
        data = block.encode(values, blocks, self._mode, self._bits_q16, stats, capacity)
        body[: data.numel()].copy_(data)
        if residual is not None:
            decoded = block.decode(data, blocks)
            residual.copy_(torch.where(decoded.isnan(), 0, values - decoded))
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        values = block.decode(body, BlockGrid(segments, body.device))
        apply_rounded(values, out, accumulate)


class ReferenceGrid:
    """The grid quantizer (docs/format.md, codec 3) at a rate of `bits` a value, or with the side's step size."""

    name = "reference"

    def __init__(self, bits: float, step_size: float | None = None) -> None:
        self._bits = bits
        self._step_size = step_size

    def with_side(self, side: Side | None) -> ReferenceGrid:
        """See `SideBodyKernel.with_side`."""
        return ReferenceGrid(self._bits, side.step_size if side is not None else None)

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped."""
        return 4 + contexts.max_bytes(numel, num_segments, grid.ESCAPE_BYTES)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        return self._encode(x.to(torch.float32), BlockGrid(segments, x.device), body, stats).numel()

    def encode_with_residual(
        self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None, residual: Tensor
    ) -> int:
        """See `ResidualBodyKernel.encode_with_residual`. The residual is what decoding the packet leaves over."""
        blocks = BlockGrid(segments, x.device)
        values = x.to(torch.float32) + residual
        data = self._encode(values, blocks, body, stats)
        decoded, _ = grid.decode(data, blocks)
        residual.copy_(torch.where(decoded.isnan(), 0, values - decoded))
        return data.numel()

    def _encode(self, values: Tensor, blocks: BlockGrid, body: Tensor, stats: PacketStats | None) -> Tensor:
        data = grid.encode(values, blocks, round(self._bits * 65536), self._step_size, stats)
        body[: data.numel()].copy_(data)
        return data

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        values, coded = grid.decode(body, BlockGrid(segments, body.device))
        if accumulate:
            # Empty blocks stay as they are: adding 0 would turn -0 into 0.
            total = out.clone()
            apply_values(values, total, True)
            places = coded.repeat_interleave(out.dtype.itemsize)  # torch.where takes no float8
            byte_view(out).copy_(torch.where(places, byte_view(total), byte_view(out)))
        else:
            apply_rounded(values, out, False)


class ReferenceDelta:
    """The exact delta (docs/format.md, codec 4) to the side's reference."""

    name = "reference"

    def __init__(self, reference: Tensor | None = None) -> None:
        self._reference = reference

    def with_side(self, side: Side | None) -> ReferenceDelta:
        """See `SideBodyKernel.with_side`."""
        return ReferenceDelta(side.reference if side is not None else None)

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped, two planes; or the exact codec's largest body."""
        own = contexts.max_bytes(numel, 1, max(dtype.itemsize, 2))
        planes = delta.MAX_PLANES[dtype.itemsize] * numel + 3
        return 4 + max(own + planes, ReferenceSplit().max_bytes(numel, dtype, num_segments))

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        reference = checked_reference(self._reference, x.dtype, x)
        data = delta.encode(x, reference, stats)
        body[: data.numel()].copy_(data)
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        reference = checked_reference(self._reference, dtype, out)
        values = delta.decode(body, reference)
        if accumulate or dtype != out.dtype:
            apply_values(values, out, accumulate)
        else:
            byte_view(out).copy_(byte_view(values))


def largest_block_body(numel: int, num_segments: int, mode: Mode, bits_q16: int) -> int:
    """Bytes of a block-quantized body with all tiles stored and all values escaped."""
    num_blocks = min(numel, numel // BLOCK_VALUES + num_segments)
    num_tiles = num_blocks // mode.tile_blocks(bits_q16) + 1
    symbols = min(numel, LANES * num_blocks) if mode is PAIRS else numel
    content = (1 + mode.escape_bytes) * symbols + num_tiles * (8 + 8)
    return 28 + num_blocks + 4 + _TABLE_BYTES + content
