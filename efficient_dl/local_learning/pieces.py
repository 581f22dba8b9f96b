"""A model as a chain of pieces: the smallest units that it can be cut into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Piece:
    """One unit of a model: one tensor in, one tensor out.

    name: where it comes from, "blocks.3". module: its parameters are the model's own objects. names: the model's key
    of every entry of module.state_dict().
    """

    name: str
    module: nn.Module
    names: Mapping[str, str]
