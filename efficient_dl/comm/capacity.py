"""Bounded messages: packets whose size follows from the plan, so that nobody has to tell it, or to wait for it.

What a rate of R bits a value promises for n values is R · n / 8 bytes; a packet gets 1/32 more, and 1 KiB. The codec
chooses its step so that it fits, and zeroes and counts what does not ("bits:RATE", docs/format.md). Of packets of 64 to
2^20 values at 0.5 to 6 bits none was cut for Gaussian and Laplacian values, 1 in 1,000 where scales differ wildly
within blocks, and 1 in 19 where few large values hide from the sample that chooses the step (docs/experiments.md).
"""

from __future__ import annotations

import torch

from efficient_dl.codec import Codec, Side

_MARGIN_SHARE, _MARGIN_BYTES = 32, 1024
_ALIGNMENT = 16
RULE = 1  # of the sizes below: ranks with another one would wait for other messages than they get
_CONSTANT = ("identity", "fp16", "bf16")  # their packets all have max_bytes


def knows_capacity(codec: str) -> bool:
    """Whether `packet_capacity` has an answer for a codec of this name."""
    return codec.partition(":")[0] in ("bits", *_CONSTANT)


def largest_growth(num_bytes: float, packets: int) -> float:
    """By how many bytes packets, so many of so many bytes in all, are longer at most than what their rate says."""
    return num_bytes / _MARGIN_SHARE + packets * (_MARGIN_BYTES + _ALIGNMENT)


def packet_capacity(codec: Codec, numel: int, dtype: torch.dtype, side: Side) -> int:
    """The bytes of every packet of so many values, the header included; the same on all ranks.

    codec: with the kernel "reference", so that no kernel's own limits count.
    """
    family, _, rate = codec.name.partition(":")
    if family in _CONSTANT or not numel:
        return codec.max_bytes(numel, dtype, side)
    bytes_q16 = -(-round(float(rate) * 65536) * numel // 8)
    room = -(-bytes_q16 * (_MARGIN_SHARE + 1) // (_MARGIN_SHARE * 65536)) + _MARGIN_BYTES
    aligned = -(-room // _ALIGNMENT) * _ALIGNMENT
    largest = codec.max_bytes(numel, dtype, side)
    return max(min(aligned, largest), codec.fixed_bytes(numel, side))
