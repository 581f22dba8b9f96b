"""Writing decoded values to the caller's tensor, or adding them to it."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_E4M3FN = 448.0


def apply_values(values: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = values, or out + values with the sums formed in float32; rounded to out's dtype."""
    values = values.to(torch.float32)
    if out.dtype == torch.float32 and accumulate:
        out.add_(values)
        return
    if accumulate:
        values = out.to(torch.float32).add_(values)
    if out.dtype == torch.float8_e4m3fn:
        # Releases of torch differ in what becomes of larger values; a packet's meaning must not.
        values = values.clamp(-_MAX_E4M3FN, _MAX_E4M3FN)
    out.copy_(values)


def apply_rounded(values: Tensor, out: Tensor, accumulate: bool) -> None:
    """`apply_values` for float32 values of a lossy codec: without accumulate, NaNs become those of docs/format.md."""
    if not accumulate:
        values = values.masked_fill(values.isnan(), torch.nan)
    apply_values(values, out, accumulate)
    if not accumulate and out.dtype == torch.bfloat16:
        # torch's vectorized conversion has a NaN of its own.
        out.masked_fill_(values.isnan(), torch.nan)
