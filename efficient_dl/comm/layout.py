"""How a flat bucket of parameters is cut into one shard a rank, on the codecs' block boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from efficient_dl.codec import Side

BLOCK_NUMEL = 256  # docs/format.md: the block grid restarts at each parameter


@dataclass(frozen=True)
class Shard:
    """The values start … stop − 1 of a bucket: what one rank sums up and distributes.

    parameters: positions (within the bucket) of the parameters it holds values of, one for each of side.segments.
    names: of the same parameters. offsets: where in its parameter each segment begins, in values.
    """

    start: int
    stop: int
    parameters: tuple[int, ...]
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    side: Side

    @property
    def numel(self) -> int:
        """The number of values."""
        return self.stop - self.start

    @property
    def segments(self) -> tuple[int, ...]:
        """How many values it holds of each of its parameters."""
        return self.side.segments or ()


@dataclass(frozen=True)
class BucketLayout:
    """The parameters of a bucket, in order, and its shards, the i-th owned by rank i.

    Shards are as equal as the block grid allows: a cut inside a parameter is a multiple of 256 values away from its
    start, so that every block is quantized whole. Small buckets can leave ranks without values.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    shards: tuple[Shard, ...]

    @staticmethod
    def of(names: Sequence[str], numels: Sequence[int], world_size: int) -> BucketLayout:
        """Returns the layout of a bucket; cached."""
        return _layout(tuple(names), tuple(numels), world_size)

    def beginning_at(self, offsets: Sequence[int]) -> BucketLayout:
        """The same bucket of pieces that begin so many values behind the start of their parameters."""
        if not any(offsets):
            return self
        shards = tuple(
            replace(
                shard,
                offsets=tuple(
                    offset + offsets[position]
                    for position, offset in zip(shard.parameters, shard.offsets, strict=True)
                ),
            )
            for shard in self.shards
        )
        return replace(self, shards=shards)

    @property
    def numel(self) -> int:
        """The number of values in the bucket."""
        return self.shards[-1].stop


def joined(pieces: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same (start, stop) pairs, ascending, with neighbours made one."""
    result: list[tuple[int, int]] = []
    for start, stop in pieces:
        begin = result.pop()[0] if result and result[-1][1] == start else start
        result.append((begin, stop))
    return tuple(result)


@lru_cache(maxsize=1024)
def _layout(names: tuple[str, ...], numels: tuple[int, ...], world_size: int) -> BucketLayout:
    offsets = (0, *accumulate(numels))
    total = offsets[-1]
    cuts = [_nearest_boundary(offsets, total * i // world_size) for i in range(world_size)]
    shards = [
        _shard(names, offsets, start, stop) for start, stop in zip(cuts, [*cuts[1:], total], strict=True)
    ]
    return BucketLayout(names, numels, tuple(shards))


def _nearest_boundary(offsets: tuple[int, ...], position: int) -> int:
    for start, stop in pairwise(offsets):
        if start <= position < stop:
            below = position - (position - start) % BLOCK_NUMEL
            above = min(below + BLOCK_NUMEL, stop)
            return below if position - below <= above - position else above
    return position


def _shard(names: tuple[str, ...], offsets: tuple[int, ...], start: int, stop: int) -> Shard:
    pieces = [
        (parameter, max(start, begin) - begin, min(stop, end) - max(start, begin))
        for parameter, (begin, end) in enumerate(pairwise(offsets))
        if max(start, begin) < min(stop, end)
    ]
    return Shard(
        start,
        stop,
        tuple(parameter for parameter, _, _ in pieces),
        tuple(names[parameter] for parameter, _, _ in pieces),
        tuple(offset for _, offset, _ in pieces),
        Side(tuple(numel for _, _, numel in pieces)),
    )
