"""Numbered access to an iterator that is read once, such as validation batches: only the latest one is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """items(number) for numbers that never fall; those that are skipped are read and dropped."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = enumerate(items)
        self._latest: tuple[int, T] | None = None

    def __call__(self, number: int) -> T:
        """Raises ValueError for a number that is past or beyond the end."""
        while self._latest is None or self._latest[0] < number:
            self._latest = next(self._items, None)
            if self._latest is None:
                raise ValueError(f"there is no item {number}")
        if self._latest[0] > number:
            raise ValueError(f"item {number} is past: {self._latest[0]} was read")
        return self._latest[1]
