"""The compiled baselines as body kernels for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.baselines import max_blockwise_bytes, max_topk_bytes, topk_count
from efficient_dl.codec.kernels.native.bodies import report
from efficient_dl.codec.kernels.native.interface import NativeStats
from efficient_dl.codec.kernels.native.library import load_library


class NativeBlockwise:
    """int8, int4 or sign (by their codec ids), with a scale for each block of at most block_values values."""

    def __init__(self, codec_id: int, block_values: int, isa: str = "auto") -> None:
        self._library = load_library(isa)
        self._codec_id = codec_id
        self._block_values = block_values
        self.name = f"native-{self._library.isa}"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """See `max_blockwise_bytes`."""
        return max_blockwise_bytes(self._codec_id, self._block_values, numel, num_segments)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        measured = None if stats is None else NativeStats()
        body_bytes = self._library.blockwise_encode(
            self._codec_id,
            x.data_ptr(),
            x.numel(),
            DTYPE_CODES[x.dtype],
            segments,
            self._block_values,
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
        self._library.blockwise_decode(
            self._codec_id,
            body.data_ptr(),
            body.numel(),
            DTYPE_CODES[dtype],
            out.numel(),
            segments,
            self._block_values,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )


class NativeTopk:
    """The largest magnitudes, `fraction` of the values."""

    def __init__(self, fraction: float, isa: str = "auto") -> None:
        self._library = load_library(isa)
        self._fraction = fraction
        self.name = f"native-{self._library.isa}"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """See `max_topk_bytes`."""
        return max_topk_bytes(dtype.itemsize, numel, topk_count(self._fraction, numel))

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        measured = None if stats is None else NativeStats()
        body_bytes = self._library.topk_encode(
            x.data_ptr(),
            x.numel(),
            DTYPE_CODES[x.dtype],
            topk_count(self._fraction, x.numel()),
            body.data_ptr(),
            body.numel(),
            measured,
        )
        report(measured, stats)
        return body_bytes

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`. With accumulate, places whose value was not kept stay as they are."""
        self._library.topk_decode(
            body.data_ptr(),
            body.numel(),
            DTYPE_CODES[dtype],
            out.numel(),
            topk_count(self._fraction, out.numel()),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )


class NativeCast:
    """Values rounded to wire_dtype."""

    def __init__(self, wire_dtype: torch.dtype, isa: str = "auto") -> None:
        self._library = load_library(isa)
        self._wire_dtype = wire_dtype
        self.name = f"native-{self._library.isa}"

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """Exactly numel values."""
        return numel * self._wire_dtype.itemsize

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        body_bytes = self._library.cast_encode(
            x.data_ptr(),
            x.numel(),
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[self._wire_dtype],
            body.data_ptr(),
            body.numel(),
        )
        if stats is not None:
            stats.order0_bits = stats.model_bits = 8.0 * body_bytes
        return body_bytes

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        self._library.cast_decode(
            body.data_ptr(),
            body.numel(),
            DTYPE_CODES[self._wire_dtype],
            out.numel(),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            accumulate,
        )
