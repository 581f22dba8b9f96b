"""What stands for a model's gradients where codecs are measured: blocks from all over them, wherever they come from."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from efficient_dl.comm.look import LOOK_NUMEL
from efficient_dl.comm.probe import SAMPLE_NUMEL, sample_gradient
from efficient_dl.comm.sampling import Spread
from efficient_dl.integrations.plan_watch import Sample

BLOCK = 256


def taken(numels: list[int], limit: int) -> list[Tensor | None]:
    """Of tensors that hold the numbers of their values."""
    spread = Spread(sum(numels), limit)
    return [spread.take(torch.arange(numel)) for numel in numels]


@pytest.mark.parametrize(
    "numels",
    [
        [3_000_000],
        [1_000_000, 100, 3_000_000, 0, 700],
        [4096] * 1000,
        [300] * 9000,
        [100] * 20_000,
        [2**18, *[64] * 50, 2**21 + 5],
    ],
    ids=lambda numels: f"{len(numels)} of {numels[0]}",
)
def test_every_part_of_a_model_has_its_share(numels: list[int]) -> None:
    limit = 1 << 18
    parts = taken(numels, limit)
    sizes = [0 if part is None else part.numel() for part in parts]
    assert sum(sizes) <= limit
    blocks = [max(numel // BLOCK, 1) if numel else 0 for numel in numels]
    share = limit / sum(numels)
    seen = got = 0
    for numel, count, size in zip(numels, blocks, sizes, strict=True):
        seen, got = seen + count, got + (size // BLOCK if numel >= BLOCK else int(size > 0))
        assert got == pytest.approx(share * seen, abs=2)


def test_a_tensors_blocks_are_whole_apart_and_in_no_step_with_its_rows() -> None:
    rows, columns = 2000, 4096
    (part,) = taken([rows * columns], 2000 * BLOCK)
    assert part is not None and part.numel() == 2000 * BLOCK
    found = part.view(-1, BLOCK)
    assert torch.equal(found, found[:, :1] + torch.arange(BLOCK))
    places = (found[:, 0] // BLOCK).tolist()
    assert all(0 < after - before <= 32 for before, after in pairwise(places))  # a stride is 16
    assert places[-1] >= rows * columns // BLOCK - 32
    assert len({place % 16 for place in places}) == 16  # every part of a row


def test_blocks_are_never_taken_twice() -> None:
    for numel in (1000, 1100, 1900, 2047, 5000):
        (part,) = taken([numel * BLOCK], 999 * BLOCK)
        assert part is not None
        assert part.unique().numel() == part.numel() >= 998 * BLOCK


def test_fewer_values_than_wanted_are_taken_as_they_are() -> None:
    x = torch.randn(1000)
    part = Spread(1000, 1000).take(x)
    assert part is not None and torch.equal(part, x) and part.data_ptr() != x.data_ptr()


def test_a_probes_sample_is_of_all_gradients_the_last_first() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(numel)) for numel in (3_000_000, 1_000_000, 2560)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    sample, segments = sample_gradient(parameters)
    assert sum(segments) == sample.numel() <= SAMPLE_NUMEL
    assert [float(part.unique()) for part in sample.split(segments)] == [3.0, 2.0, 1.0]
    assert segments[2] / segments[1] == pytest.approx(3.0, rel=0.01)


def test_a_looks_sample_is_of_all_buckets() -> None:
    numels = [100_000] * 50
    sample = Sample(sum(numels))
    for _ in range(2):
        for first in range(0, 50, 10):  # buckets of ten parameters
            values = torch.arange(first, first + 10.0).repeat_interleave(100_000)
            sample.keep(values, numels[:10])
        sample.keep(torch.ones(100_000, dtype=torch.bfloat16), [100_000])  # another dtype than the first
        values, segments = sample.taken()
        assert values is not None and values.dtype == torch.float32 and values.numel() == sum(segments)
        assert 0.99 * LOOK_NUMEL < values.numel() <= LOOK_NUMEL
        assert values.unique().tolist() == list(range(50))
        assert max(segments) - min(segments) <= BLOCK
        sample.forget()
    assert sample.taken() == (None, [])

    sample.keep(torch.tensor([1.0, torch.nan]), [2])
    assert sample.taken()[0] is None
