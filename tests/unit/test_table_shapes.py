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

# What stands where along a table's 4,096 slots. Bytes may be looked up in buckets of 32 slots with two symbols each,
# and slot by slot in the first and last 128, if at most 64 occur.
SHAPES: dict[str, list[int]] = {
    "one symbol": [TOTAL],
    "two": [4095, 1],
    "a boundary inside one bucket": [1000, 7, TOTAL - 1007],
    "as many symbols as fit, boundaries between buckets": [64] * 64,
    "boundaries inside every other bucket": [33, 63] * 31 + [1120],
    "one symbol too many": [63] * 64 + [64],
    "all bytes": [16] * 256,
    "single slots at both ends": [1] * 31 + [2034, 2000] + [1] * 31,
    "the ends used up, then rare ones": [1] * 127 + [TOTAL - 254] + [1] * 127,
    "a rare one across the first end": [126, 1, 2, 1, TOTAL - 130],
    "three symbols in a bucket": [2000, 3, 3, TOTAL - 2006],
    "a symbol that fills a bucket": [32 * 40, 32, TOTAL - 32 * 41],
    "falling by halves": [2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 1],
    "rising by halves": [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048],
}


def tensor_of(counts: list[int], first: int) -> Tensor:
    """65,536 values in all, in an order of no pattern; byte `first + k` occurs 16 * counts[k] times."""
    assert sum(counts) == TOTAL
    symbols = (torch.arange(len(counts)) + first) % 256
    values = symbols.repeat_interleave(16 * torch.tensor(counts)).to(torch.uint8)
    return values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(7))]


@pytest.mark.parametrize("first", [1, 60, 180])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_table_codes_and_decodes_alike(shape: str, first: int) -> None:
    x = tensor_of(SHAPES[shape], first)
    reference = ReferenceSplit()
    room = torch.zeros(reference.max_bytes(x.numel(), DTYPE, 1), dtype=torch.uint8)
    body = room[: reference.encode(x.view(DTYPE), (x.numel(),), room, None)]
    if 1 < len(SHAPES[shape]) < 250:
        assert body.numel() < x.numel()  # entropy-coded, not stored
    for isa in ISAS:
        kernel = NativeSplit(isa)
        coded = torch.zeros(kernel.max_bytes(x.numel(), DTYPE, 1), dtype=torch.uint8)
        assert torch.equal(coded[: kernel.encode(x.view(DTYPE), (x.numel(),), coded, None)], body)
        out = torch.zeros_like(x).view(DTYPE)
        kernel.decode(body, DTYPE, (x.numel(),), out, False)
        assert torch.equal(out.view(torch.uint8), x), isa
