"""The exact codec on a GPU (docs/format.md, codec 1): what is launched, in which order, and with what room."""

# pyright: reportUnknownMemberType=false
# (Triton's kernels have untyped parameters.)
from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.reference import split as reference
from efficient_dl.codec.kernels.triton import split_decode, split_encode, tables

_BLOCK_VALUES: Final = 256
_TILE_VALUES: Final = 32768
_LANES: Final = 128
_TABLE_WORDS: Final = 104
_SAMPLE_BLOCKS: Final = 64
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

# A tile is one warp's work, as in `rans`: a prefix sum is a few shuffles and no barrier. The other kernels are bound by
# memory; a program takes enough values to hide its latency, and few enough that 25 MiB fill the processors.
_CODING_WARPS: Final = 1
_WARPS: Final = 4
_MEASURED_BLOCKS: Final = 32
_GROUP: Final = 8
_PARTS: Final = 8
_SCAN_CHUNK: Final = 1024


class TritonSplit:
    """The exact codec (docs/format.md, codec 1) as a `DeviceBodyKernel`."""

    name = "triton"
    # Of another dtype's packet even the number of bytes in a value is another: it is decoded by other kernels.
    reads_any_dtype = False

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored."""
        return 8 + 12 * _cdiv(numel, _TILE_VALUES) + 4 * _cdiv(numel * dtype.itemsize, 4)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> Tensor:
        """See `DeviceBodyKernel.encode`. Takes about 2 bytes a value of room for itself.

        What is launched depends on numel and dtype only, so that a CUDA graph can hold it. Stats come from the
        reference, which codes the tensor a second time and waits for the device.
        """
        if stats is not None:
            reference.encode(x, stats)
        return _encode(x, body)

    def decode_on_device(
        self,
        packet: Tensor,
        dtype: torch.dtype,
        segments: tuple[int, ...],
        out: Tensor,
        accumulate: bool,
        status: Tensor,
    ) -> None:
        """See `DeviceBodyKernel.decode_on_device`. Takes about 1 byte a value of room for itself."""
        _decode(packet, dtype, out, accumulate, status)


def _encode(x: Tensor, body: Tensor) -> Tensor:
    width, numel, device = x.dtype.itemsize, x.numel(), x.device
    values = x.view(_INTEGERS[width])
    num_blocks, num_tiles = _cdiv(numel, _BLOCK_VALUES), _cdiv(numel, _TILE_VALUES)
    capacity = min(_TILE_VALUES, _TILE_VALUES * width // 2)
    num_fields = 1 + _num_planes(width)

    # What starts at zero: the symbols' counts, the table, the sample's sums, and what coding saves.
    zeros = torch.zeros(256 + _TABLE_WORDS + 4, dtype=torch.int32, device=device)
    counts, table = zeros[:256], zeros[256 : 256 + _TABLE_WORDS]
    sample, saved = zeros[-4:-2], zeros[-2:].view(torch.int64)
    entries = torch.empty(256, dtype=torch.uint64, device=device)
    table_bytes = torch.empty(1, dtype=torch.int32, device=device)
    codes = torch.empty(num_blocks, dtype=torch.uint8, device=device)
    records = torch.empty(num_blocks, dtype=torch.int32, device=device)
    starts = torch.empty(num_fields * num_blocks, dtype=torch.int32, device=device)
    words = torch.empty(num_tiles * capacity, dtype=torch.uint16, device=device)
    states = torch.empty(num_tiles * _LANES, dtype=torch.uint32, device=device)
    tiles = torch.empty(6 * num_tiles, dtype=torch.int32, device=device)
    sizes = torch.empty(2 * num_tiles, dtype=torch.int32, device=device)
    offsets = torch.empty(num_tiles, dtype=torch.int64, device=device)
    place = torch.empty(3, dtype=torch.int64, device=device)

    if width > 1:
        stride = max(1, num_blocks // _SAMPLE_BLOCKS)
        grid = (_cdiv(_cdiv(num_blocks, stride), _GROUP),)
        _launch(
            split_encode.sample_kernel, grid, values, sample, numel, stride, WIDTH=width, GROUP=_GROUP,
            num_warps=_WARPS,
        )  # fmt: skip
    _launch(
        split_encode.measure_kernel, (_cdiv(num_blocks, _MEASURED_BLOCKS),),
        values, sample, codes, records, counts, numel, num_blocks,
        WIDTH=width, BLOCKS=_MEASURED_BLOCKS, GROUP=_GROUP, num_warps=_WARPS,
    )  # fmt: skip
    _launch(tables.build_kernel, (1,), counts, entries, table, table_bytes, ALPHABET=256, num_warps=1)
    _launch(
        split_encode.code_kernel, (num_tiles,),
        values, codes, records, entries, words, states, starts, tiles, sizes, saved, numel, num_blocks, num_tiles,
        WIDTH=width, CAPACITY=capacity, num_warps=_CODING_WARPS,
    )  # fmt: skip
    _launch(
        split_encode.layout_kernel, (1,),
        body[: body.numel() // 4 * 4].view(torch.int32), table, table_bytes, saved, sizes, offsets, place,
        num_tiles, CHUNK=_SCAN_CHUNK, num_warps=_WARPS,
    )  # fmt: skip
    _launch(
        split_encode.place_kernel, (num_tiles, _PARTS),
        values, body, codes, records, words, states, starts, tiles, sizes, offsets, place, numel, num_blocks, num_tiles,
        WIDTH=width, CAPACITY=capacity, PARTS=_PARTS, GROUP=_GROUP, num_warps=_WARPS,
    )  # fmt: skip
    return place[0]


def _decode(packet: Tensor, dtype: torch.dtype, out: Tensor, accumulate: bool, status: Tensor) -> None:
    width, numel, device = dtype.itemsize, out.numel(), out.device
    num_blocks, num_tiles = _cdiv(numel, _BLOCK_VALUES), _cdiv(numel, _TILE_VALUES)
    values = out.view(_INTEGERS[out.dtype.itemsize])

    entries = torch.empty(256, dtype=torch.uint32, device=device)
    slots = torch.empty(4096, dtype=torch.uint32, device=device)
    offsets = torch.empty(num_tiles, dtype=torch.int64, device=device)
    place = torch.empty(1, dtype=torch.int64, device=device)
    symbols = torch.empty(num_blocks * _BLOCK_VALUES, dtype=torch.uint8, device=device)
    carried = torch.empty(num_tiles * _BLOCK_VALUES, dtype=torch.uint8, device=device)
    starts = torch.empty((1 + _num_planes(width)) * num_blocks, dtype=torch.int32, device=device)
    counts = torch.empty(num_blocks, dtype=torch.int32, device=device)
    kinds = torch.empty(num_tiles, dtype=torch.int32, device=device)

    _launch(
        split_decode.open_kernel, (1,), packet, status, entries, offsets, place, num_tiles,
        CHUNK=_SCAN_CHUNK, num_warps=_WARPS,
    )  # fmt: skip
    _launch(tables.expand_kernel, (16,), entries, slots, BLOCK=256, num_warps=_WARPS)
    _launch(
        split_decode.decode_kernel, (num_tiles,),
        packet, values, slots, offsets, place, symbols, carried, starts, counts, kinds, status,
        numel, num_blocks, num_tiles,
        WIDTH=width, FUSED=width == 2 and out.dtype == dtype and not accumulate, num_warps=_CODING_WARPS,
    )  # fmt: skip
    _launch(
        split_decode.merge_kernel, (num_tiles, _PARTS),
        packet, values, offsets, place, symbols, carried, starts, counts, kinds,
        status, numel, num_blocks, WIDTH=width, DTYPE=DTYPE_CODES[dtype], OUT_DTYPE=DTYPE_CODES[out.dtype],
        ACCUMULATE=accumulate, PARTS=_PARTS, GROUP=_GROUP, num_warps=_WARPS,
    )  # fmt: skip


def _num_planes(width: int) -> int:
    return {1: 0, 2: 1, 4: 3}[width]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    # The half-precision scale and a sum must not become one multiply-add, which rounds once.
    kernel[grid](*arguments, enable_fp_fusion=False, **options)
