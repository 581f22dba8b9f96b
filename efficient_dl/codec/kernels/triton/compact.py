"""From tiles in slots of their own to one packet: the scan over their sizes, the copies, the header."""

# pyright: basic
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Large enough that no sum of tile sizes reaches it: for packets without a capacity.
NO_LIMIT = 1 << 62


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


@triton.jit
def header_kernel(packet_ptr, total_ptr, body_bytes_ptr, kinds, numel, fingerprint):
    """The header of a packet without a checksum; the body's bytes come from the device's memory."""
    total = tl.load(body_bytes_ptr) + 32
    tl.store(total_ptr, total)
    tl.store(packet_ptr, 0x504C4445)  # "EDLP"
    tl.store(packet_ptr + 1, kinds)
    tl.store(packet_ptr + 2, numel)
    tl.store(packet_ptr + 3, fingerprint)
    tl.store(packet_ptr + 4, total.to(tl.int32))
    tl.store(packet_ptr + 5, (total >> 32).to(tl.int32))
    tl.store(packet_ptr + 6, 0)
    tl.store(packet_ptr + 7, 0)


def write_header_on_device(
    packet: Tensor, body_bytes: Tensor, version: int, codec: int, dtype: int, flags: int, numel: int, fingerprint: int
) -> Tensor:
    """Fills packet[:32], which starts at a multiple of 4 bytes; returns the packet's bytes, 0-dim int64.

    body_bytes: 0-dim int64 on the packet's device.
    """
    total = torch.empty((), dtype=torch.int64, device=packet.device)
    kinds = _signed(version | codec << 8 | dtype << 16 | flags << 24)
    header_kernel[(1,)](
        packet[:32].view(torch.int32), total, body_bytes, kinds, numel, _signed(fingerprint), num_warps=1
    )
    return total


def _signed(value: int) -> int:
    """A 32-bit pattern as the int32 that has it: Triton would take a larger integer for 64 bits."""
    return value - (1 << 32) if value >> 31 else value
