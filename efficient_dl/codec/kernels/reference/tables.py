"""Frequency tables: from counts to 12-bit probabilities, in integers only, and their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference.wire import Reader, pad4
from efficient_dl.errors import CorruptPacket

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS


def normalize(counts: Tensor) -> Tensor:
    """Frequencies that sum to 4096 with at least 1 for every symbol that occurs.

    counts: int64, 1-D, at least one of them positive. Returns int64 of the same shape and device. The correction
    steps take the symbol whose code length changes least per unit (docs/format.md).
    """
    count = counts.cpu()
    total = int(count.sum())
    frequency = torch.where(count > 0, ((count * TOTAL + total // 2) // total).clamp(min=1), 0)
    weight = count << 20
    excess = int(frequency.sum()) - TOTAL
    for _ in range(excess):
        cost = torch.where(frequency > 1, weight // (2 * frequency - 1), torch.iinfo(torch.int64).max)
        frequency[_first(cost == cost.min())] -= 1
    for _ in range(-excess):
        gain = torch.where(frequency > 0, weight // (2 * frequency + 1), -1)
        frequency[_first(gain == gain.max())] += 1
    return frequency.to(counts.device)


def serialize(frequency: Tensor) -> Tensor:
    """Bitmap of the present symbols, then frequency - 1 of each in 12 bits; padded to 4 bytes. uint8."""
    present = frequency > 0
    values = frequency[present] - 1
    value_bits = (values[:, None] >> torch.arange(PROBABILITY_BITS, device=values.device)) & 1
    return pad4(torch.cat([pack_bits(present.to(torch.int64)), pack_bits(value_bits.view(-1))]))


def serialized_bytes(num_present: int, alphabet: int) -> int:
    """The length of a serialized table with so many symbols present."""
    return -(-(-(-alphabet // 8) + -(-num_present * PROBABILITY_BITS // 8)) // 4) * 4


def parse(data: Tensor, alphabet: int) -> Tensor:
    """The inverse of `serialize`; raises `CorruptPacket` for anything that `serialize` would not write."""
    bitmap_bytes = (alphabet + 7) // 8
    if data.numel() < bitmap_bytes:
        raise CorruptPacket("the frequency table is cut short")
    present = unpack_bits(data[:bitmap_bytes])
    if bool(present[alphabet:].any()):
        raise CorruptPacket("the frequency table names symbols outside of its alphabet")
    present = present[:alphabet].bool()
    num_present = int(present.sum())
    value_bits = num_present * PROBABILITY_BITS
    expected_bytes = serialized_bytes(num_present, alphabet)
    if data.numel() != expected_bytes:
        raise CorruptPacket(
            "the frequency table has the wrong length",
            expected=f"{expected_bytes} bytes",
            found=f"{data.numel()}",
        )
    bits = unpack_bits(data[bitmap_bytes:])
    if bool(bits[value_bits:].any()):
        raise CorruptPacket("the frequency table's padding is not zero")
    shifts = torch.arange(PROBABILITY_BITS, device=data.device)
    values = (bits[:value_bits].view(-1, PROBABILITY_BITS) << shifts).sum(1) + 1
    if int(values.sum()) != TOTAL:
        raise CorruptPacket("the frequencies do not sum to 4096", found=str(int(values.sum())))
    frequency = torch.zeros(alphabet, dtype=torch.int64, device=data.device)
    frequency[present] = values
    return frequency


def parse_next(reader: Reader, alphabet: int) -> Tensor:
    """Parses the next table of several that were stored one after the other."""
    bitmap_bytes = (alphabet + 7) // 8
    num_present = int(unpack_bits(reader.peek(bitmap_bytes)).sum())
    return parse(reader.take(serialized_bytes(num_present, alphabet)), alphabet)


def starts(frequency: Tensor) -> Tensor:
    """Exclusive prefix sums: where each symbol's slots begin. frequency: (A,), or (tables, A)."""
    return torch.cumsum(frequency, -1) - frequency


def _first(matches: Tensor) -> int:
    return int(matches.nonzero()[0])


def pack_bits(bits: Tensor) -> Tensor:
    """int64 zeros and ones, 1-D, to bytes; bit i goes to bit i & 7 of byte i >> 3."""
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.int64, device=bits.device)
    padded[: bits.numel()] = bits
    return (padded.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def unpack_bits(data: Tensor) -> Tensor:
    """The inverse of `pack_bits`: int64, eight a byte."""
    return ((data.to(torch.int64)[:, None] >> torch.arange(8, device=data.device)) & 1).view(-1)
