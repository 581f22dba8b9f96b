"""Casts in torch: values rounded to float16 or bfloat16 (docs/format.md, "Baselines")."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.packet import byte_view
from efficient_dl.errors import CorruptPacket


def encode(x: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """Returns x's values in wire_dtype as bytes; NaNs become the one of that dtype, unless x has it already."""
    if x.dtype == wire_dtype:
        return byte_view(x)
    values = x.to(torch.float32)
    return byte_view(values.to(wire_dtype).masked_fill_(values.isnan(), torch.nan))


def decode(body: Tensor, wire_dtype: torch.dtype, numel: int) -> Tensor:
    """Returns the values in wire_dtype, 1-D; raises `CorruptPacket` for another length."""
    expected = numel * wire_dtype.itemsize
    if body.numel() != expected:
        raise CorruptPacket(
            "a cast packet has the wrong length",
            expected=f"{expected} bytes of body",
            found=f"{body.numel()}",
        )
    # A packet may start anywhere in a receive buffer: clone, so that a typed view is aligned.
    return body.clone().view(wire_dtype)
