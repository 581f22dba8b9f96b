"""The baselines' reference kernels as body kernels: torch operations on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.kernels.baselines import max_blockwise_bytes, max_topk_bytes, topk_count
from efficient_dl.codec.kernels.reference import blockwise, cast, topk
from efficient_dl.codec.kernels.reference.outputs import apply_rounded, apply_values
from efficient_dl.codec.packet import byte_view


class ReferenceBlockwise:
    """int8, int4 or sign, with a scale for each block of at most block_values values."""

    name = "reference"

    def __init__(self, form: blockwise.BlockFormat, block_values: int) -> None:
        self._form = form
        self._block_values = block_values

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """See `max_blockwise_bytes`."""
        return max_blockwise_bytes(self._form.codec_id, self._block_values, numel, num_segments)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        data = blockwise.encode(x, segments, self._block_values, self._form, stats)
        body[: data.numel()].copy_(data)
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        values = blockwise.decode(body, segments, self._block_values, self._form)
        apply_rounded(values, out, accumulate)


class ReferenceTopk:
    """The largest magnitudes, `fraction` of the values."""

    name = "reference"

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """See `max_topk_bytes`."""
        return max_topk_bytes(dtype.itemsize, numel, topk_count(self._fraction, numel))

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        data = topk.encode(x, topk_count(self._fraction, x.numel()), stats)
        body[: data.numel()].copy_(data)
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`. With accumulate, places whose value was not kept stay as they are."""
        count = topk_count(self._fraction, out.numel())
        positions, values = topk.decode(body, dtype, out.numel(), count)
        places = byte_view(out).view(-1, out.dtype.itemsize)  # torch indexes no float8
        if accumulate:
            kept = places[positions].view(out.dtype).view(-1)
            apply_values(values.to(torch.float32), kept, True)
            values = kept
        else:
            places.zero_()
            if dtype != out.dtype:
                # A NaN keeps its bits in its own dtype only: processors widen them differently.
                values = values.to(out.dtype).masked_fill_(values.isnan(), torch.nan)
        places[positions] = byte_view(values).view(-1, out.dtype.itemsize)


class ReferenceCast:
    """Values rounded to wire_dtype."""

    name = "reference"

    def __init__(self, wire_dtype: torch.dtype) -> None:
        self._wire_dtype = wire_dtype

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """Exactly numel values."""
        return numel * self._wire_dtype.itemsize

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        data = cast.encode(x, self._wire_dtype)
        body[: data.numel()].copy_(data)
        if stats is not None:
            stats.order0_bits = stats.model_bits = 8.0 * data.numel()
        return data.numel()

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        values = cast.decode(body, self._wire_dtype, out.numel())
        if self._wire_dtype == out.dtype and not accumulate:
            byte_view(out).copy_(byte_view(values))
        else:
            apply_rounded(values.to(torch.float32), out, accumulate)
