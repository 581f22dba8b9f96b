"""How sharded parameters lie in a flat, rank-chunked buffer, and which of its values are only padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from efficient_dl.codec import Side
from efficient_dl.comm.layout import BucketLayout, Shard, joined


@dataclass(frozen=True)
class ChunkLayout:
    """A buffer of one chunk a rank; a chunk holds that rank's part of every parameter, one after the other.

    bucket: names and numels of the parameters, and a shard for each chunk: its values without the padding. The block
        grid restarts at each parameter.
    chunk_numel: values in a chunk, padding included, the same for all ranks.
    pieces: for each rank, (start, stop) within its chunk of what is not padding; neighbours are joined.
    slots: (start, stop) within a chunk of each parameter, padding included.
    """

    bucket: BucketLayout
    chunk_numel: int
    pieces: tuple[tuple[tuple[int, int], ...], ...]
    slots: tuple[tuple[int, int], ...]

    @staticmethod
    def of(
        names: Sequence[str], numels: Sequence[int], slot_numels: Sequence[int], world_size: int
    ) -> ChunkLayout:
        """Returns the layout; cached.

        numels: values of each parameter. slot_numels: values of it in every chunk; rank r holds its values from
        r · slot_numel on, the last ranks fewer of them or none, and padding instead.
        """
        return _layout(tuple(names), tuple(numels), tuple(slot_numels), world_size)

    def chunks(self, buffer: Tensor) -> list[Tensor]:
        """The chunks of a buffer, views, by rank."""
        numel = self.chunk_numel
        return [buffer[rank * numel : (rank + 1) * numel] for rank in range(len(self.pieces))]

    def take(self, chunk: Tensor, rank: int) -> Tensor:
        """The values of a rank's chunk without padding, 1-D: a view if they lie together, else a copy."""
        pieces = self.pieces[rank]
        if len(pieces) <= 1:
            start, stop = pieces[0] if pieces else (0, 0)
            return chunk[start:stop]
        return torch.cat([chunk[start:stop] for start, stop in pieces])

    def put(self, values: Tensor, chunk: Tensor, rank: int) -> None:
        """Fills a rank's chunk with what `take` returned, changed since, and with zeros where padding is."""
        position = 0
        if len(self.pieces[rank]) > 1:
            sizes = [stop - start for start, stop in self.pieces[rank]]
            for (start, stop), part in zip(self.pieces[rank], values.split_with_sizes(sizes), strict=True):
                chunk[start:stop].copy_(part)
        for start, stop in (*self.pieces[rank], (self.chunk_numel, self.chunk_numel)):
            chunk[position:start].zero_()
            position = stop

    def parameters(self, buffer: Tensor) -> dict[str, Tensor]:
        """Every parameter's values by name, 1-D: copies out of a buffer of all ranks' chunks."""
        chunks = self.chunks(buffer)
        return {
            name: torch.cat([chunk[start:stop] for chunk in chunks])[:numel]
            for name, numel, (start, stop) in zip(
                self.bucket.names, self.bucket.numels, self.slots, strict=True
            )
        }


@lru_cache(maxsize=1024)
def _layout(
    names: tuple[str, ...], numels: tuple[int, ...], slot_numels: tuple[int, ...], world_size: int
) -> ChunkLayout:
    starts = (0, *accumulate(slot_numels))
    shards: list[Shard] = []
    pieces: list[tuple[tuple[int, int], ...]] = []
    stop = 0
    for rank in range(world_size):
        held = [
            min(max(numel - rank * slot, 0), slot) for numel, slot in zip(numels, slot_numels, strict=True)
        ]
        own = [position for position, numel in enumerate(held) if numel]
        start, stop = stop, stop + sum(held)
        shards.append(
            Shard(
                start,
                stop,
                tuple(own),
                tuple(names[position] for position in own),
                tuple(rank * slot_numels[position] for position in own),
                Side(tuple(held[position] for position in own)),
            )
        )
        pieces.append(joined([(starts[position], starts[position] + held[position]) for position in own]))
    slots = tuple(pairwise(starts))
    return ChunkLayout(BucketLayout(names, numels, tuple(shards)), starts[-1], tuple(pieces), slots)
