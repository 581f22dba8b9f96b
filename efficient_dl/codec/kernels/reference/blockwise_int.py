"""int8 and int4 in torch: a step for each block from its largest magnitude, rounding to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.kernels.baselines import INT4, INT8
from efficient_dl.codec.kernels.reference.blockwise import (
    INFINITY,
    NAN_SCALE,
    SMALLEST_NORMAL,
    scale_values,
)
from efficient_dl.errors import CorruptPacket


class _IntegerFormat:
    """q = x / step, half to even, step = max |x| / level rounded up to 16 bits (docs/format.md, "Baselines")."""

    smallest_scale = SMALLEST_NORMAL

    def __init__(self, level: int) -> None:
        self._level = level

    def scales(self, rows: Tensor) -> Tensor:
        """See `BlockFormat.scales`."""
        highest = (rows.view(torch.int32) & 0x7FFFFFFF).amax(1)
        is_finite = highest < INFINITY << 16
        # A tensor as divisor: with a number, torch may multiply by its reciprocal.
        level = torch.full((), self._level, dtype=torch.float32, device=rows.device)
        bits = (torch.where(is_finite, highest, 0).view(torch.float32) / level).view(torch.int32)
        scales = (bits + 0xFFFF) >> 16
        scales = torch.where((scale_values(scales) * level).isinf(), scales - 1, scales)
        scales = torch.where(bits < SMALLEST_NORMAL << 16, 0, scales)
        return torch.where(is_finite, scales, NAN_SCALE)

    def _rounded(self, rows: Tensor, scales: Tensor) -> Tensor:
        return (rows / scales).clamp_(-self._level, self._level).round_()


class Int8Format(_IntegerFormat):
    """A byte a value, two's complement."""

    codec_id = INT8
    values_per_byte = 1

    def __init__(self) -> None:
        super().__init__(127)

    def neutral(self) -> int:
        """See `BlockFormat.neutral`."""
        return 0

    def quantize(self, rows: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.quantize`."""
        return self._rounded(rows, scales).to(torch.int8).view(torch.uint8)

    def pack(self, symbols: Tensor) -> Tensor:
        """See `BlockFormat.pack`."""
        return symbols

    def unpack(self, payload: Tensor, length: int) -> Tensor:
        """See `BlockFormat.unpack`."""
        if bool((payload == 0x80).any()):
            raise CorruptPacket("an int8 packet holds -128, which no encoder writes")
        return payload

    def dequantize(self, symbols: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.dequantize`."""
        return symbols.view(torch.int8).to(torch.float32) * scales


class Int4Format(_IntegerFormat):
    """Two values a byte, q + 8 each, the first in the low half."""

    codec_id = INT4
    values_per_byte = 2

    def __init__(self) -> None:
        super().__init__(7)

    def neutral(self) -> int:
        """See `BlockFormat.neutral`."""
        return 8

    def quantize(self, rows: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.quantize`."""
        return self._rounded(rows, scales).add_(8).to(torch.uint8)

    def pack(self, symbols: Tensor) -> Tensor:
        """See `BlockFormat.pack`."""
        if symbols.shape[1] % 2:
            symbols = torch.cat([symbols, symbols.new_full((symbols.shape[0], 1), 8)], 1)
        return symbols[:, 0::2] | symbols[:, 1::2] << 4

    def unpack(self, payload: Tensor, length: int) -> Tensor:
        """See `BlockFormat.unpack`."""
        symbols = torch.stack([payload & 15, payload >> 4], 2).view(payload.shape[0], -1)
        if bool((symbols[:, length:] != 8).any()):
            raise CorruptPacket("padding behind the end of a short int4 block is not zero")
        symbols = symbols[:, :length]
        if bool((symbols == 0).any()):
            raise CorruptPacket("an int4 packet holds -8, which no encoder writes")
        return symbols

    def dequantize(self, symbols: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.dequantize`."""
        return (symbols.to(torch.float32) - 8) * scales
