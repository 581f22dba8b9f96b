"""sign in torch: one bit a value, and the mean magnitude of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.kernels.baselines import SIGN
from efficient_dl.codec.kernels.reference.blockwise import INFINITY, NAN_SCALE
from efficient_dl.errors import CorruptPacket

_CHUNK_VALUES = 1024


class SignFormat:
    """Bit i mod 8 of byte i div 8 is the sign of a block's value i (docs/format.md, "Baselines").

    Source: Seide et al. 2014 and Karimireddy et al. 2019, with the scale of the latter for each block.
    """

    codec_id = SIGN
    values_per_byte = 8
    smallest_scale = 0

    def scales(self, rows: Tensor) -> Tensor:
        """See `BlockFormat.scales`."""
        is_finite = (rows.view(torch.int32) & 0x7FFFFFFF).amax(1) < INFINITY << 16
        magnitudes = torch.where(is_finite[:, None], rows, 0.0).abs().to(torch.float64)
        num_blocks, length = magnitudes.shape
        if length > _CHUNK_VALUES:
            missing = -length % _CHUNK_VALUES
            chunks = torch.nn.functional.pad(magnitudes, (0, missing)).view(-1, _CHUNK_VALUES)
            magnitudes = _fold(chunks).view(num_blocks, -1)
        bits = (_fold(magnitudes)[:, 0] / length).to(torch.float32).view(torch.int32)
        scales = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).clamp(max=INFINITY - 1)
        return torch.where(is_finite, scales, NAN_SCALE)

    def neutral(self) -> int:
        """See `BlockFormat.neutral`."""
        return 0

    def quantize(self, rows: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.quantize`."""
        return (rows.view(torch.int32) < 0).to(torch.uint8)

    def pack(self, symbols: Tensor) -> Tensor:
        """See `BlockFormat.pack`."""
        eights = torch.nn.functional.pad(symbols, (0, -symbols.shape[1] % 8)).view(symbols.shape[0], -1, 8)
        return (eights << _places(symbols.device)).sum(2, dtype=torch.uint8)

    def unpack(self, payload: Tensor, length: int) -> Tensor:
        """See `BlockFormat.unpack`."""
        symbols = (payload[:, :, None] >> _places(payload.device) & 1).view(payload.shape[0], -1)
        if bool(symbols[:, length:].any()):
            raise CorruptPacket("padding behind the end of a short sign block is not zero")
        return symbols[:, :length]

    def dequantize(self, symbols: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.dequantize`."""
        return torch.where(symbols != 0, -scales, scales)


def _fold(values: Tensor) -> Tensor:
    # Sums of rows in one order everywhere: v[i] += v[i + m/2], zeros behind the end up to a power of two m.
    width = 1 << (values.shape[1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[1]))
    while width > 1:
        width //= 2
        values = values[:, :width] + values[:, width:]
    return values


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
