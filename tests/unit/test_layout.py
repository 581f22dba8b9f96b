"""Buckets are cut into shards on the codecs' block boundaries."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_dl.comm import BucketLayout

NUMELS = st.lists(st.integers(1, 3000), min_size=1, max_size=8)


def layout_of(numels: list[int], world_size: int) -> BucketLayout:
    return BucketLayout.of([f"p{i}" for i in range(len(numels))], numels, world_size)


@given(NUMELS, st.integers(1, 9))
def test_shards_cover_the_bucket_once_and_in_order(numels: list[int], world_size: int) -> None:
    layout = layout_of(numels, world_size)
    ends = [0, *(shard.stop for shard in layout.shards)]
    assert len(layout.shards) == world_size
    assert [shard.start for shard in layout.shards] == ends[:-1]
    assert ends[-1] == sum(numels) == layout.numel
    assert ends == sorted(ends)


@given(NUMELS, st.integers(1, 9))
def test_shards_end_on_block_boundaries_of_their_parameter(numels: list[int], world_size: int) -> None:
    layout = layout_of(numels, world_size)
    starts = list(itertools.accumulate(numels, initial=0))
    for shard in layout.shards:
        parameter = max(i for i, start in enumerate(starts) if start <= shard.stop)
        assert (shard.stop - starts[parameter]) % 256 == 0


@given(NUMELS, st.integers(1, 9))
def test_segments_say_how_much_of_each_parameter_a_shard_holds(numels: list[int], world_size: int) -> None:
    layout = layout_of(numels, world_size)
    held = [0] * len(numels)
    for shard in layout.shards:
        assert sum(shard.segments) == shard.numel
        for parameter, numel in zip(shard.parameters, shard.segments, strict=True):
            held[parameter] += numel
    assert held == numels


@given(st.integers(1, 9))
def test_shards_of_large_parameters_are_equal_to_a_block(world_size: int) -> None:
    sizes = [shard.numel for shard in layout_of([100_000, 50_000], world_size).shards]
    assert max(sizes) - min(sizes) <= 2 * 256


def test_a_bucket_smaller_than_a_block_leaves_ranks_without_values() -> None:
    assert sorted(shard.numel for shard in layout_of([100], 3).shards) == [0, 0, 100]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_layout_is_made_once(world_size: int) -> None:
    assert layout_of([700, 10], world_size) is layout_of([700, 10], world_size)
