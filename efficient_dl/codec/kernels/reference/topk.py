"""Top-k in torch: the largest magnitudes, as positions and values (docs/format.md, "Baselines")."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.kernels.reference.wire import Reader, from_bytes, pad4, to_bytes
from efficient_dl.codec.packet import byte_view
from efficient_dl.errors import CorruptPacket

HEADER_BYTES: Final = 12

_BITMAP: Final = 2
_GAP_WIDTHS: Final = {0: 1, 1: 2}  # mode: bytes a gap
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_MAGNITUDE: Final = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFFFFFF}


def encode(x: Tensor, count: int, stats: PacketStats | None) -> Tensor:
    """Returns a body, uint8: the positions of the `count` largest magnitudes of x, and their values."""
    positions = _largest(x, count)
    candidates = [_encode_gaps(positions, width) for width in _GAP_WIDTHS.values()]
    sizes = [data.numel() for data in candidates]
    mode = _BITMAP
    for candidate, size in zip(_GAP_WIDTHS, sizes, strict=True):
        if size <= -(-x.numel() // 8) and size == min(sizes):
            mode = candidate
            break
    data = candidates[mode] if mode in _GAP_WIDTHS else _encode_bitmap(positions, x.numel())
    values = byte_view(x).view(-1, x.dtype.itemsize)[positions].view(-1)  # torch indexes no float8
    if stats is not None:
        stats.header_bits = 8.0 * HEADER_BYTES
        stats.order0_bits = stats.model_bits = 8.0 * (data.numel() + values.numel())
    head = to_bytes(torch.tensor([count, mode, data.numel()], device=x.device), 4)
    return torch.cat([head, pad4(data), values])


def decode(body: Tensor, dtype: torch.dtype, numel: int, count: int) -> tuple[Tensor, Tensor]:
    """Returns the kept values' positions (int64, in order) and the values in dtype; raises `CorruptPacket`."""
    reader = Reader(body)
    found, mode, position_bytes = reader.integers(3, 4)
    if found != count or (mode not in _GAP_WIDTHS and mode != _BITMAP):
        raise CorruptPacket(
            "a top-k packet's parameters do not fit its tensor",
            expected=f"{count} values, mode 0 to 2",
            found=f"{found} values, mode {mode}",
            fix="decode it with the codec that encoded it",
        )
    data = reader.take(position_bytes)
    reader.align4()
    # A packet may start anywhere in a receive buffer: clone, so that a typed view is aligned.
    values = reader.take(count * dtype.itemsize).clone().view(dtype)
    reader.end()
    positions = _decode_bitmap(data, numel) if mode == _BITMAP else _decode_gaps(data, _GAP_WIDTHS[mode])
    if positions.numel() != count or int(positions[-1]) >= numel:
        raise CorruptPacket(
            "the kept values' positions do not fit their tensor",
            expected=f"{count} positions below {numel}",
            found=f"{positions.numel()} positions",
        )
    return positions, values


def _largest(x: Tensor, count: int) -> Tensor:
    width = x.dtype.itemsize
    # A value's bits without the sign order magnitudes; infinities and then NaNs are above all others.
    magnitude = x.view(_INTEGERS[width]).to(torch.int32) & _MAGNITUDE[width]
    threshold = magnitude.kthvalue(x.numel() - count + 1).values
    above = (magnitude > threshold).nonzero()[:, 0]
    equal = (magnitude == threshold).nonzero()[: count - above.numel(), 0]
    return torch.cat([above, equal]).sort().values


def _skip(width: int) -> int:
    return (1 << (8 * width)) - 1


def _encode_gaps(positions: Tensor, width: int) -> Tensor:
    skip = _skip(width)
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    skips = gaps // skip
    ends = (skips + 1).cumsum(0) - 1
    words = positions.new_full((int(ends[-1]) + 1,), skip)
    words[ends] = gaps - skips * skip
    return to_bytes(words, width)


def _decode_gaps(data: Tensor, width: int) -> Tensor:
    if data.numel() == 0 or data.numel() % width:
        raise CorruptPacket("a top-k packet's positions end within a gap")
    words = from_bytes(data, width)
    is_named = words != _skip(width)
    if not bool(is_named[-1]):
        raise CorruptPacket("a top-k packet's positions end with a skip")
    return ((words + is_named).cumsum(0) - 1)[is_named]


def _encode_bitmap(positions: Tensor, numel: int) -> Tensor:
    bits = torch.zeros(-(-numel // 8) * 8, dtype=torch.uint8, device=positions.device)
    bits[positions] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        1, dtype=torch.uint8
    )


def _decode_bitmap(data: Tensor, numel: int) -> Tensor:
    if data.numel() != -(-numel // 8):
        raise CorruptPacket(
            "a top-k packet's bitmap has the wrong length",
            expected=f"{-(-numel // 8)} bytes",
            found=f"{data.numel()}",
        )
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    positions = (data[:, None] >> places & 1).view(-1).nonzero()[:, 0]
    if positions.numel() == 0:
        raise CorruptPacket("a top-k packet's bitmap is empty")
    return positions
