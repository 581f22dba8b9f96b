"""The coders look symbols up in ways that depend on the table: every shape of it gives the same bytes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_dl.codec.kernels.native.bodies import NativeSplit
from efficient_dl.codec.kernels.native.library import available_isas
from efficient_dl.codec.kernels.reference.bodies import ReferenceSplit

ISAS = available_isas()
TOTAL = 4096  # of a table's frequencies, which are these counts when there are as many values
DTYPE = torch.float8_e4m3fn  # its symbols are the values' bytes: any table can be asked for
BUCKET, EDGE, MOST_SYMBOLS = 32, 128, 64

# The symbols' counts along a table's 4,096 slots, and whether permutes can look them up: at most 64 symbols, and at
# most two in every bucket of 32 slots but for the first and last 128 slots, which are told apart one by one.
SHAPES: dict[str, tuple[list[int], bool]] = {
    "one symbol": ([TOTAL], True),
    "two": ([4095, 1], True),
    "a boundary inside one bucket": ([1000, 3096], True),
    "as many symbols as fit, boundaries between buckets": ([64] * 64, True),
    "boundaries inside every other bucket": ([33, 63] * 31 + [1120], True),
    "single slots at both ends": ([1] * 31 + [2034, 2000] + [1] * 31, True),
    "a rare one across the first end": ([126, 1, 2, 3967], True),
    "a rare one across the last end": ([3967, 2, 1, 126], True),
    "rare ones in the ends' inner buckets": ([100, 1, 1, 3892, 1, 1, 100], True),
    "a symbol that fills a bucket": ([32 * 40, 32, TOTAL - 32 * 41], True),
    "falling by halves": ([2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 1], True),
    "rising by halves": ([1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], True),
    "one symbol too many": ([63] * 64 + [64], False),
    "nearly all bytes": ([1] * 254 + [TOTAL - 254], False),
    "the ends used up, then rare ones": ([1] * 30 + [98, 3, 3, 3934] + [1] * 28, False),
    "three symbols in a bucket": ([2000, 3, 3, TOTAL - 2006], False),
}


def fits(counts: list[int]) -> bool:
    """The rule, once more."""
    symbols = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).view(-1, BUCKET)
    inner = symbols[EDGE // BUCKET : -EDGE // BUCKET]
    return len(counts) <= MOST_SYMBOLS and int((inner[:, -1] - inner[:, 0]).max()) <= 1


def tensor_of(counts: list[int], first: int) -> Tensor:
    """65,536 values in all, in an order of no pattern; byte `first + k` occurs 16 * counts[k] times."""
    assert sum(counts) == TOTAL
    symbols = (torch.arange(len(counts)) + first) % 256
    values = symbols.repeat_interleave(16 * torch.tensor(counts)).to(torch.uint8)
    return values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(7))]


@pytest.mark.parametrize("first", [1, 60, 180])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_table_codes_and_decodes_alike(shape: str, first: int) -> None:
    counts, is_looked_up_by_permutes = SHAPES[shape]
    assert fits(counts) == is_looked_up_by_permutes
    x = tensor_of(counts, first)
    reference = ReferenceSplit()
    room = torch.zeros(reference.max_bytes(x.numel(), DTYPE, 1), dtype=torch.uint8)
    body = room[: reference.encode(x.view(DTYPE), (x.numel(),), room, None)]
    assert body.numel() < x.numel()  # entropy-coded, not stored
    for isa in ISAS:
        kernel = NativeSplit(isa)
        coded = torch.zeros(kernel.max_bytes(x.numel(), DTYPE, 1), dtype=torch.uint8)
        assert torch.equal(coded[: kernel.encode(x.view(DTYPE), (x.numel(),), coded, None)], body)
        out = torch.zeros_like(x).view(DTYPE)
        kernel.decode(body, DTYPE, (x.numel(),), out, False)
        assert torch.equal(out.view(torch.uint8), x), isa
