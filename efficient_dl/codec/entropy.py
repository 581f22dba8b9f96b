"""Entropy, the unit of account: how many bits a set of symbols is worth."""

from __future__ import annotations

import torch
from torch import Tensor


def order0_bits(counts: Tensor) -> float:
    """Bits that a memoryless ideal coder needs for symbols with these counts: -sum c log2(c / N).

    counts: any shape, non-negative integers. Returns bits for all N symbols together (0 for no symbols).
    Source: Shannon 1948.
    """
    present = counts[counts > 0].to(torch.float64)
    return float((present * (present.sum().log2() - present.log2())).sum()) if present.numel() else 0.0


def model_bits(counts: Tensor, frequencies: Tensor) -> float:
    """Bits that an ideal coder needs for these counts under a 12-bit table (frequencies sum to 4096)."""
    used = counts > 0
    return float((counts[used].to(torch.float64) * (12.0 - frequencies[used].to(torch.float64).log2())).sum())
