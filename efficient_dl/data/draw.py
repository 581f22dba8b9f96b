"""Random numbers as a pure function of their coordinates: the same on every machine and in every version."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

# The finalizer and the increment of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
# generators"). numpy and torch may change their generators between versions; a data order must not change.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)

WINDOW, SHUFFLE, SHIFT_ROW, SHIFT_COLUMN, MIRROR = range(5)  # streams: what a number is drawn for


def draw(seed: int, stream: int, step: int | Integers, index: Integers) -> Words:
    """One 64-bit word for each (step, index), of the broadcast shape of the two."""
    word = np.full(1, seed, dtype=np.uint64)
    for coordinate in (stream, step, index):
        # at least one axis: numpy warns of the intended overflow where it computes with scalars
        coordinates = np.atleast_1d(coordinate).astype(np.uint64)
        word = _mix(word ^ _mix((coordinates + np.uint64(1)) * _GOLDEN))
    return word


def draw_below(limit: int, seed: int, stream: int, step: int | Integers, index: Integers) -> Integers:
    """Like `draw`, as int64 in [0, limit); limit up to 2**40 keeps the bias of the remainder below 1e-7."""
    return (draw(seed, stream, step, index) % np.uint64(limit)).astype(np.int64)


@lru_cache(maxsize=4)
def permutation(numel: int, seed: int, epoch: int) -> Integers:
    """The order of `numel` samples in an epoch: int64, read-only. Cached, because a step asks for it again."""
    order = np.argsort(draw(seed, SHUFFLE, epoch, np.arange(numel)), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _mix(word: Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * _MULTIPLY_1
    word = (word ^ (word >> np.uint64(27))) * _MULTIPLY_2
    return word ^ (word >> np.uint64(31))
