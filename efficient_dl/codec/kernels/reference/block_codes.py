"""The codes of a coded tile's blocks as bytes, as many bits each as their range needs (docs/format.md, codec 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference import tables
from efficient_dl.codec.kernels.reference.wire import Reader, pad4
from efficient_dl.errors import CorruptPacket

_LARGEST = 255


def pack(codes: Tensor) -> Tensor:
    """Returns the section of these codes, uint8. codes: int64 (blocks,), 0 to 255, one above 0."""
    others = codes[codes > 0]
    low, high = int(others.min()), int(others.max())
    empty = int(others.numel() < codes.numel())
    width = (high - low + empty).bit_length()
    fields = torch.where(codes > 0, codes - low + empty, 0)
    bits = (fields[:, None] >> torch.arange(width, device=codes.device)) & 1
    head = torch.tensor([low, width, empty, 0], dtype=torch.uint8, device=codes.device)
    return torch.cat([head, pad4(tables.pack_bits(bits.view(-1)))])


def unpack(content: Reader, num_blocks: int) -> Tensor:
    """Returns the codes of the section at the front of a tile, int64 (num_blocks,)."""
    low, width, empty, reserved = content.integers(4, 1)
    if not low or width > 8 or empty > 1 or reserved:
        raise CorruptPacket(
            "the head of a tile's codes is invalid",
            expected="low 1 to 255, width 0 to 8, empty 0 or 1, then 0",
            found=f"{low}, {width}, {empty}, {reserved}",
        )
    bits = tables.unpack_bits(content.take(-(-num_blocks * width // 8)))
    if bool(bits[num_blocks * width :].any()):
        raise CorruptPacket("padding is not zero", where="a tile's codes")
    content.align4()
    shifts = torch.arange(width, device=bits.device)
    fields = (bits[: num_blocks * width].view(num_blocks, width) << shifts).sum(1)
    codes = low + fields - empty
    if empty:
        codes = torch.where(fields == 0, 0, codes)
    if bool((codes > _LARGEST).any()):
        raise CorruptPacket(
            "a block's code is out of range", expected="at most 255", found=str(int(codes.max()))
        )
    return codes
