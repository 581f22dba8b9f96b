"""The compiled codecs of integers with contexts as body kernels for CPU tensors."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats, Side
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.native.bodies import report
from efficient_dl.codec.kernels.native.interface import NativeStats
from efficient_dl.codec.kernels.native.library import load_library
from efficient_dl.codec.packet import checked_reference


class NativeGrid:
    """The grid quantizer (docs/format.md, codec 3) at a rate of `bits` a value, or with the side's step size."""

    def __init__(self, bits: float, isa: str = "auto", step_size: float | None = None) -> None:
        self._library = load_library(isa)
        self._bits = bits
        self._isa = isa
        self._step_size = step_size
        self.name = f"native-{self._library.isa}"

    def with_side(self, side: Side | None) -> NativeGrid:
        """See `SideBodyKernel.with_side`."""
        return NativeGrid(self._bits, self._isa, side.step_size if side is not None else None)

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped."""
        return self._library.grid_max_bytes(numel, num_segments)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        return self._encode(x, segments, body, stats, None)

    def encode_with_residual(
        self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None, residual: Tensor
    ) -> int:
        """See `ResidualBodyKernel.encode_with_residual`."""
        return self._encode(x, segments, body, stats, residual.data_ptr())

    def _encode(
        self,
        x: Tensor,
        segments: tuple[int, ...],
        body: Tensor,
        stats: PacketStats | None,
        residual: int | None,
    ) -> int:
        measured = None if stats is None else NativeStats()
        body_bytes = self._library.grid_encode(
            x.data_ptr(),
            x.numel(),
            DTYPE_CODES[x.dtype],
            residual,
            segments,
            round(self._bits * 65536),
            self._step_size or 0.0,
            body.data_ptr(),
            body.numel(),
            measured,
        )
        report(measured, stats)
        if stats is not None:
            (stats.step_size,) = struct.unpack("<f", body[:4].numpy().tobytes())
        return body_bytes

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        self._library.grid_decode(
            body.data_ptr(),
            body.numel(),
            DTYPE_CODES[dtype],
            out.numel(),
            segments,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )


class NativeDelta:
    """The exact delta (docs/format.md, codec 4) to the side's reference."""

    def __init__(self, isa: str = "auto", reference: Tensor | None = None) -> None:
        self._library = load_library(isa)
        self._isa = isa
        self._reference = reference
        self.name = f"native-{self._library.isa}"

    def with_side(self, side: Side | None) -> NativeDelta:
        """See `SideBodyKernel.with_side`."""
        return NativeDelta(self._isa, side.reference if side is not None else None)

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All tiles stored, all values escaped, two planes; or the exact codec's largest body."""
        return self._library.delta_max_bytes(numel, DTYPE_CODES[dtype])

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        reference = checked_reference(self._reference, x.dtype, x)
        measured = None if stats is None else NativeStats()
        body_bytes = self._library.delta_encode(
            x.data_ptr(),
            reference.data_ptr(),
            x.numel(),
            DTYPE_CODES[x.dtype],
            body.data_ptr(),
            body.numel(),
            measured,
        )
        report(measured, stats)
        return body_bytes

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        reference = checked_reference(self._reference, dtype, out)
        self._library.delta_decode(
            body.data_ptr(),
            body.numel(),
            reference.data_ptr(),
            DTYPE_CODES[dtype],
            out.numel(),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )
