"""What every data set offers: batches that depend on (seed, step) alone, and a fingerprint of its content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from efficient_dl.config import DataSpec
from efficient_dl.data.draw import Integers

# Up to here the whole content is hashed (0.2 s a GB); above, chunks spread evenly over it: 16 MiB in all.
FULL_HASH_BYTES = 256 * 2**20
CHUNK_BYTES = 2**16
NUM_CHUNKS = 256


class Dataset(Protocol):
    """Training and validation data, deterministic.

    Step s trains on the samples 0 … batch_size · world_size · accumulate − 1 of its *global batch*, a function of
    the seed and s. A rank takes a contiguous slice of them, in `accumulate` equal parts. So any number of ranks
    trains on the same samples as long as the product is the same, and a run resumes from its step number alone.
    """

    name: str
    spec: DataSpec
    fingerprint: str
    num_train: int  # tokens or images
    num_validation: int

    def train_batch(
        self,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        accumulate: int = 1,
        part: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(x, y) of `batch_size` samples on the CPU: part `part` of `accumulate` of this rank's slice.

        x, y as in DataSpec, with the batch in front, in memory that nothing else uses.
        """
        ...

    def eval_batches(self, num_batches: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most num_batches of (x, y) of validation data: every time, for every seed and on every rank the same.

        Samples are spread evenly over the validation data. Where it holds fewer than are asked for, each comes
        once, and the last batch may be short.
        """
        ...


def slice_of_step(rank: int, world_size: int, batch_size: int, accumulate: int, part: int) -> Integers:
    """Which samples of a step's global batch a rank takes in one part: int64 (batch_size,)."""
    if not (0 <= rank < world_size and 0 <= part < accumulate and batch_size > 0):
        raise ValueError(f"no part {part} of {accumulate} on rank {rank} of {world_size}, batch {batch_size}")
    return (rank * accumulate + part) * batch_size + np.arange(batch_size)


def spread(available: int, wanted: int) -> Integers:
    """min(wanted, available) indices below `available`, in order and evenly spaced: int64."""
    count = min(available, wanted)
    return np.arange(count) * available // max(count, 1)


def content_fingerprint(parts: Sequence[NDArray[np.generic]]) -> str:
    """A hash of arrays' dtypes, shapes and bytes: "xxh3:" and 32 hexadecimal digits.

    Of an array above 256 MiB only 256 evenly spaced chunks of 64 KiB are read, so that starting on a corpus of
    many gigabytes takes no minutes; a change between them goes unnoticed. The prefix then is "xxh3-sampled:".
    """
    digest = xxhash.xxh3_128()
    sampled = False
    for part in parts:
        digest.update(f"{part.dtype.str} {part.shape};".encode())
        content = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        if content.size <= FULL_HASH_BYTES:
            digest.update(content.data)
            continue
        sampled = True
        for start in spread(content.size - CHUNK_BYTES + 1, NUM_CHUNKS - 1):
            digest.update(content[start : start + CHUNK_BYTES].tobytes())
        digest.update(content[-CHUNK_BYTES:].tobytes())
    return ("xxh3-sampled:" if sampled else "xxh3:") + digest.hexdigest()
