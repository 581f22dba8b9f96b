"""Writing decoded values to the caller's tensor, or adding them to it."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_values(values: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = values, or out + values with the sums formed in float32; rounded to out's dtype."""
    if not accumulate:
        out.copy_(values)
    elif out.dtype == torch.float32:
        out.add_(values)
    else:
        out.copy_(out.to(torch.float32).add_(values))
