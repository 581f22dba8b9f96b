"""What a model has to know about its data."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal


@dataclass(frozen=True)
class DataSpec:
    """The shapes of one sample.

    kind "tokens": x and y are int64 of shape (context,), y is x one token later; classes is the vocabulary.
    kind "images": x is float32 of shape (channels, height, width), y an int64 class below `classes`.
    """

    kind: Literal["tokens", "images"]
    classes: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in one sample's x."""
        return prod(self.shape)
