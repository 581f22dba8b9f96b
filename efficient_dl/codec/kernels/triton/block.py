"""The block quantizer on a GPU (docs/format.md, codec 2): what is launched, in which order, and with what room."""

# Triton types the launches of kernels as calls of the functions that they are made from.
# pyright: reportUnknownMemberType=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.reference.block import bounded_bits_q16, fixed_bytes
from efficient_dl.codec.kernels.reference.block_grid import count_blocks
from efficient_dl.codec.kernels.reference.bodies import largest_block_body
from efficient_dl.codec.kernels.reference.symbols import MAX_PAIR_BITS, PAIRS, SINGLES
from efficient_dl.codec.kernels.triton import (
    block_decode,
    block_encode,
    block_quantize,
    block_search,
    tables,
)
from efficient_dl.codec.kernels.triton.block_layout import block_starts, to_device
from efficient_dl.codec.kernels.triton.block_stats import fill_stats
from efficient_dl.codec.kernels.triton.block_workspace import Workspace, cut
from efficient_dl.codec.kernels.triton.header import is_interpreted
from efficient_dl.codec.steps import STEPS, index_without_sample

# A tile is one warp's work, as in `rans`. So is a group of two blocks when it is quantized: without barriers it takes
# 55 instructions for 32 values instead of 93 with four warps and eight blocks (sm_90, counted, not timed).
_CODING_WARPS: Final = 1
_QUANTIZING_WARPS: Final = 1
_QUANTIZED_BLOCKS: Final = 2
# The interpreter's time goes by operations, not by values.
_INTERPRETED_BLOCKS: Final = 32
_MEASURED_BLOCKS: Final = 32
_MEASURING_WARPS: Final = 8
_FILLED_BLOCKS: Final = 16
# Each program adds its counts to memory once: more programs fill the chip better, fewer add less.
_MAX_PROGRAMS: Final = 2112
_LISTED_BLOCKS: Final = 256
_SCAN_CHUNK: Final = 1024
_COPY_PARTS: Final = 8
_COPY_BLOCK: Final = 512
_SLOTS_BLOCK: Final = 256
_SAMPLE_BLOCKS: Final = 64
_MIN_SAMPLE_BLOCKS: Final = 8
_MIN_TILE_BLOCKS: Final = 64
_NO_CAPACITY: Final = 1 << 62
# Every kernel rounds after each operation, as docs/format.md asks.
_EXACT: Final[dict[str, Any]] = {"enable_fp_fusion": False}


class TritonBlock:
    """The block quantizer at a rate of `bits` a value. Takes about 4 bytes a value of room for itself."""

    name = "triton"
    reads_any_dtype = True

    def __init__(self, bits: float) -> None:
        self._bits_q16 = round(bits * 65536)
        self._mode = PAIRS if self._bits_q16 <= MAX_PAIR_BITS * 65536 else SINGLES
        self._tile_blocks = self._mode.tile_blocks(self._bits_q16)
        self._steps: dict[torch.device, Tensor] = {}

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped."""
        return largest_block_body(numel, num_segments, self._mode, self._bits_q16)

    def fixed_bytes(self, segments: tuple[int, ...]) -> int:
        """See `LossyBodyKernel.fixed_bytes`."""
        return fixed_bytes(count_blocks(segments), self._mode, self._bits_q16)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> Tensor:
        """See `DeviceBodyKernel.encode`."""
        return self.encode_lossy(x, segments, body, stats, None, None)

    def encode_lossy(
        self,
        x: Tensor,
        segments: tuple[int, ...],
        body: Tensor,
        stats: PacketStats | None,
        residual: Tensor | None,
        capacity: int | None,
    ) -> Tensor:
        """See `LossyBodyKernel.encode_lossy`. What runs depends on numel, dtype and segments only."""
        mode, tile_blocks, num_blocks = self._mode, self._tile_blocks, count_blocks(segments)
        num_tiles = -(-num_blocks // tile_blocks)
        target = self._bits_q16
        if capacity is not None:
            target = bounded_bits_q16(capacity, x.numel(), num_blocks, mode, self._bits_q16)
        values, dtype = _kernel_view(x), DTYPE_CODES[x.dtype]
        left = values if residual is None else residual
        starts = block_starts(segments, x.device)
        place = values if starts is None else starts
        steps = self._steps_on(x.device)
        kinds: dict[str, Any] = {"HAS_RESIDUAL": residual is not None, "HAS_STARTS": starts is not None}
        kinds["MODE"] = mode.code
        work = Workspace(num_blocks, num_tiles, tile_blocks, mode, x.device)

        stride = max(1, num_blocks // _SAMPLE_BLOCKS)
        num_sampled = -(-num_blocks // stride)
        if num_sampled < _MIN_SAMPLE_BLOCKS:
            work.index.fill_(index_without_sample(target))
        else:
            for done in range(block_search.ROUNDS):
                block_search.measure_kernel[(7, -(-num_sampled // _MEASURED_BLOCKS))](
                    values, left, place, steps, work.measured, work.interval, x.numel(), num_blocks, stride,
                    DONE=done, BLOCKS=_MEASURED_BLOCKS, DTYPE=dtype, num_warps=_MEASURING_WARPS, **kinds, **_EXACT,
                )  # fmt: skip
                block_search.narrow_kernel[(1,)](
                    work.measured, work.interval, work.index, target, DONE=done, MODE=mode.code
                )
        group = _INTERPRETED_BLOCKS if is_interpreted() else _QUANTIZED_BLOCKS
        programs = min(-(-num_blocks // group), _MAX_PROGRAMS)
        block_quantize.quantize_kernel[(programs,)](
            values, left, place, steps, work.index, work.symbols, work.escapes, work.codes, work.num_escapes,
            work.counts, work.largest_code, x.numel(), num_blocks,
            BLOCKS=group, DTYPE=dtype, num_warps=_QUANTIZING_WARPS, **kinds, **_EXACT,
        )  # fmt: skip
        block_quantize.finish_codes_kernel[(num_tiles,)](
            left, place, work.symbols, work.escapes, work.codes, work.num_escapes, work.counts,
            work.largest_code, body[28:], work.order, work.escapes_before, work.tile_blocks, work.tile_values,
            work.tile_escapes, x.numel(), num_blocks, T=tile_blocks, CHUNK=_LISTED_BLOCKS, **kinds, **_EXACT,
        )  # fmt: skip
        tables.build_kernel[(1,)](
            work.counts, work.entries, work.table, work.table_bytes, ALPHABET=mode.alphabet, num_warps=1
        )
        block_encode.encode_kernel[(num_tiles,)](
            work.symbols, work.order, work.entries, work.tile_blocks, work.tile_values, work.tile_escapes,
            work.words, work.states, work.cursors, work.sizes, work.infos,
            T=tile_blocks, SLOT=work.slot_words, MODE=mode.code, num_warps=_CODING_WARPS,
        )  # fmt: skip
        block_encode.plan_kernel[(1,)](
            body[: body.numel() // 4 * 4].view(torch.int32), work.sizes, work.infos, work.tile_blocks, work.offsets,
            work.index, work.largest_code, work.table_bytes, work.plan, num_blocks, num_tiles,
            _NO_CAPACITY if capacity is None else capacity, T=tile_blocks, MODE=mode.code, CHUNK=_SCAN_CHUNK,
        )  # fmt: skip
        block_encode.copy_kernel[(num_tiles, _COPY_PARTS)](
            body, left, place, work.symbols, work.escapes, work.codes, work.order, work.escapes_before,
            work.tile_blocks, work.words, work.states, work.cursors, work.sizes, work.infos, work.offsets,
            work.table, work.plan, x.numel(), num_blocks, num_tiles,
            T=tile_blocks, LEVELS=tile_blocks.bit_length() - 1, SLOT=work.slot_words, PARTS=_COPY_PARTS,
            BLOCK=_COPY_BLOCK, **kinds, **_EXACT,
        )  # fmt: skip
        if stats is not None:
            fill_stats(stats, work, body)
        return work.plan[2]

    def decode_on_device(
        self,
        packet: Tensor,
        dtype: torch.dtype,
        segments: tuple[int, ...],
        out: Tensor,
        accumulate: bool,
        status: Tensor,
    ) -> None:
        """See `DeviceBodyKernel.decode_on_device`."""
        num_blocks, device = count_blocks(segments), packet.device
        most_tiles = -(-num_blocks // _MIN_TILE_BLOCKS)
        entries = torch.empty(256, dtype=torch.uint32, device=device)
        slots = torch.empty(4096, dtype=torch.uint32, device=device)
        wide = torch.empty(block_decode.PLAN + most_tiles, dtype=torch.int64, device=device)
        plan, offsets = cut(wide, block_decode.PLAN, most_tiles)
        narrow = torch.empty(2 * num_blocks + 2 * most_tiles, dtype=torch.int32, device=device)
        row_starts, row_shapes, tile_blocks, tile_values = cut(
            narrow, num_blocks, num_blocks, most_tiles, most_tiles
        )
        starts = block_starts(segments, device)
        place = row_starts if starts is None else starts
        has_starts, target = starts is not None, _kernel_view(out)
        kinds: dict[str, Any] = {"DTYPE": DTYPE_CODES[out.dtype], "ACCUMULATE": accumulate}
        block_decode.open_kernel[(1,)](packet, status, entries, offsets, plan, num_blocks, CHUNK=_SCAN_CHUNK)
        tables.expand_kernel[(4096 // _SLOTS_BLOCK,)](entries, slots, BLOCK=_SLOTS_BLOCK)
        block_decode.list_kernel[(most_tiles,)](
            packet, status, plan, place, row_starts, row_shapes, tile_blocks, tile_values, out.numel(),
            num_blocks, HAS_STARTS=has_starts, CHUNK=_LISTED_BLOCKS,
        )  # fmt: skip
        block_decode.decode_kernel[(most_tiles,)](
            packet, status, plan, slots, offsets, row_starts, row_shapes, tile_blocks, tile_values, target,
            num_warps=_CODING_WARPS, **kinds, **_EXACT,
        )  # fmt: skip
        block_decode.fill_kernel[(-(-num_blocks // _FILLED_BLOCKS),)](
            packet, status, place, target, out.numel(), num_blocks,
            BLOCKS=_FILLED_BLOCKS, HAS_STARTS=has_starts, **kinds, **_EXACT,
        )  # fmt: skip

    def _steps_on(self, device: torch.device) -> Tensor:
        if device not in self._steps:
            self._steps[device] = to_device(list(STEPS), torch.float32, device)
        return self._steps[device]


def _kernel_view(x: Tensor) -> Tensor:
    """bfloat16 and float8 as their bits: the kernels convert them themselves."""
    if x.dtype.itemsize == 1:
        return x.view(torch.uint8)
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
