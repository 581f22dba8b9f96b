"""What int8, int4 and sign share: the blocks of a flat tensor, and a body of scales and packed values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.entropy import order0_bits
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, to_bytes
from efficient_dl.errors import CorruptPacket

NAN_SCALE: Final = 0x7FC0  # scales are the top halves of float32 numbers
INFINITY: Final = 0x7F80
SMALLEST_NORMAL: Final = 0x0080
HEADER_BYTES: Final = 4
SCALE_BYTES: Final = 2


@dataclass(frozen=True)
class Run:
    """Blocks of equal length that lie one after the other: a matrix of the tensor's memory."""

    start: int
    num_blocks: int
    length: int

    def rows(self, flat: Tensor) -> Tensor:
        """These blocks of a flat tensor as (num_blocks, length), sharing its memory."""
        return flat[self.start : self.start + self.num_blocks * self.length].view(
            self.num_blocks, self.length
        )


class BlockFormat(Protocol):
    """How one codec turns blocks into scales and bytes. Rows are float32 (blocks, length)."""

    codec_id: int
    values_per_byte: int
    smallest_scale: int

    def scales(self, rows: Tensor) -> Tensor:
        """Each block's scale, int32 (blocks,), below 2^15: 0 for an empty one, `NAN_SCALE` for a non-finite one."""
        ...

    def quantize(self, rows: Tensor, scales: Tensor) -> Tensor:
        """One symbol a value, uint8 (blocks, length); scales: float32 (blocks, 1), 1 where there is none."""
        ...

    def neutral(self) -> int:
        """The symbol of the blocks without a scale."""
        ...

    def pack(self, symbols: Tensor) -> Tensor:
        """Symbols to bytes, uint8 (blocks, payload bytes)."""
        ...

    def unpack(self, payload: Tensor, length: int) -> Tensor:
        """The inverse of `pack`; raises `CorruptPacket` for bytes that no encoder writes."""
        ...

    def dequantize(self, symbols: Tensor, scales: Tensor) -> Tensor:
        """float32 (blocks, length); scales: float32 (blocks, 1), NaN for a non-finite block."""
        ...


def block_runs(segments: tuple[int, ...], block_values: int) -> list[Run]:
    """The grid of blocks of at most block_values values, restarting at each segment, in order."""
    runs: list[Run] = []
    start = 0

    def append(num_blocks: int, length: int) -> None:
        nonlocal start
        if num_blocks == 0 or length == 0:
            return
        if runs and runs[-1].length == length:
            last = runs.pop()
            runs.append(Run(last.start, last.num_blocks + num_blocks, length))
        else:
            runs.append(Run(start, num_blocks, length))
        start += num_blocks * length

    for segment in segments:
        append(segment // block_values, block_values)
        append(1, segment % block_values)
    return runs


def scale_values(scales: Tensor) -> Tensor:
    """int32 scales, the top halves of float32 numbers, as those numbers."""
    return (scales << 16).view(torch.float32)


def _has_scale(scales: Tensor) -> Tensor:
    # Whether blocks with these int32 scales are neither empty nor non-finite.
    return (scales != 0) & (scales != NAN_SCALE)


def payload_bytes(length: int, values_per_byte: int) -> int:
    """Bytes of one block's values."""
    return -(-length // values_per_byte)


def encode(
    x: Tensor, segments: tuple[int, ...], block_values: int, form: BlockFormat, stats: PacketStats | None
) -> Tensor:
    """Returns a body, uint8: the block size, the scales, the packed values. x: 1-D, any of the codecs' dtypes."""
    scale_parts: list[Tensor] = []
    payload_parts: list[Tensor] = []
    counts = torch.zeros(256, dtype=torch.int64, device=x.device)
    for run in block_runs(segments, block_values):
        rows = run.rows(x).to(torch.float32)
        bits = form.scales(rows)
        has_scale = _has_scale(bits)[:, None]
        scales = torch.where(has_scale, scale_values(bits)[:, None], 1.0)
        # Blocks without a scale are emptied before they are rounded: a NaN has no integer.
        symbols = form.quantize(torch.where(has_scale, rows, 0.0), scales)
        symbols = torch.where(has_scale, symbols, form.neutral())
        scale_parts.append(bits)
        payload_parts.append(form.pack(symbols).view(-1))
        if stats is not None:
            counts += torch.bincount(symbols[has_scale[:, 0]].view(-1).to(torch.int64), minlength=256)
    scales = torch.cat(scale_parts)
    payload = torch.cat(payload_parts)
    if stats is not None:
        stats.order0_bits = order0_bits(counts)
        stats.model_bits = 8.0 * payload.numel()
        stats.scale_bits = 8.0 * SCALE_BYTES * scales.numel()
        stats.header_bits = 8.0 * HEADER_BYTES
        stats.empty_blocks = int((scales == 0).sum())
        stats.nonfinite_blocks = int((scales == NAN_SCALE).sum())
    head = to_bytes(torch.tensor([block_values], device=x.device), HEADER_BYTES)
    return torch.cat([head, to_bytes(scales, SCALE_BYTES), payload])


def decode(body: Tensor, segments: tuple[int, ...], block_values: int, form: BlockFormat) -> Tensor:
    """Returns the decoded values, float32 1-D; raises `CorruptPacket`."""
    reader = Reader(body)
    (found,) = reader.integers(1, HEADER_BYTES)
    if found != block_values:
        raise CorruptPacket(
            "the packet's blocks have another size",
            expected=f"{block_values} values",
            found=str(found),
            fix="decode it with the codec that encoded it",
        )
    runs = block_runs(segments, block_values)
    num_blocks = sum(run.num_blocks for run in runs)
    bits = from_bytes(reader.take(SCALE_BYTES * num_blocks), SCALE_BYTES).to(torch.int32)
    is_number = (bits >= form.smallest_scale) & (bits < INFINITY)
    if not bool((~_has_scale(bits) | is_number).all()):
        raise CorruptPacket("a block's scale is out of range")
    scales = scale_values(bits)
    out = torch.empty(sum(segments), dtype=torch.float32, device=body.device)
    first = 0
    for run in runs:
        width = payload_bytes(run.length, form.values_per_byte)
        payload = reader.take(run.num_blocks * width).view(run.num_blocks, width)
        here = slice(first, first + run.num_blocks)
        symbols = form.unpack(payload, run.length)
        if bool((symbols[~_has_scale(bits[here])] != form.neutral()).any()):
            raise CorruptPacket("a block without a scale holds other values than zeros")
        run.rows(out).copy_(form.dequantize(symbols, scales[here, None]))
        first += run.num_blocks
    reader.end()
    return out
