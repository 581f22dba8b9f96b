"""The compiled codecs as body kernels for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.native.interface import NativeStats, float_array
from efficient_dl.codec.kernels.native.library import load_library
from efficient_dl.codec.packet import HEADER_BYTES
from efficient_dl.codec.steps import FIRST_STEP_INDEX, STEPS

_STEPS = float_array(STEPS)


class NativeSplit:
    """The exact codec (docs/format.md, codec 1)."""

    def __init__(self, isa: str = "auto") -> None:
        self._library = load_library(isa)
        self.name = f"native-{self._library.isa}"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored."""
        return self._library.split_max_bytes(numel, DTYPE_CODES[dtype])

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        measured = None if stats is None else NativeStats()
        body_bytes = self._library.split_encode(
            x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], body.data_ptr(), body.numel(), measured
        )
        report(measured, stats)
        return body_bytes

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        self._library.split_decode(
            body.data_ptr(),
            body.numel(),
            DTYPE_CODES[dtype],
            out.numel(),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )


class NativeBlock:
    """The block quantizer (docs/format.md, codec 2) at a rate of `bits` a value."""

    def __init__(self, bits: float, isa: str = "auto") -> None:
        self._library = load_library(isa)
        self._bits_q16 = round(bits * 65536)
        self.name = f"native-{self._library.isa}"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped."""
        return self._library.block_max_bytes(numel, num_segments, self._bits_q16)

    def fixed_bytes(self, segments: tuple[int, ...]) -> int:
        """See `LossyBodyKernel.fixed_bytes`."""
        return HEADER_BYTES + self._library.block_fixed_bytes(sum(segments), segments, self._bits_q16)

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
        """See `LossyBodyKernel.encode_lossy`."""
        measured = None if stats is None else NativeStats()
        body_bytes = self._library.block_encode(
            x.data_ptr(),
            x.numel(),
            DTYPE_CODES[x.dtype],
            None if residual is None else residual.data_ptr(),
            segments,
            self._bits_q16,
            _STEPS,
            None if capacity is None else capacity - HEADER_BYTES,
            body.data_ptr(),
            body.numel(),
            measured,
        )
        if measured is not None and stats is not None:
            stats.relative_step = STEPS[measured.step_index - FIRST_STEP_INDEX]
            stats.dropped_blocks = measured.dropped_blocks
        report(measured, stats)
        return body_bytes

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        self._library.block_decode(
            body.data_ptr(),
            body.numel(),
            DTYPE_CODES[dtype],
            out.numel(),
            segments,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )


def report(measured: NativeStats | None, stats: PacketStats | None) -> None:
    """Copies what the library measured, if it was asked to, into the caller's stats."""
    if measured is None or stats is None:
        return
    stats.order0_bits = measured.order0_bits
    stats.model_bits = measured.model_bits
    stats.scale_bits = measured.scale_bits
    stats.header_bits = float(measured.header_bits)
    stats.escapes = measured.escapes
    stats.largest_escape = measured.largest_escape
    stats.empty_blocks = measured.empty_blocks
    stats.nonfinite_blocks = measured.nonfinite_blocks
