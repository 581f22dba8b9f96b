"""What a run's settings of compression mean for one of its partitions, whose parameters have names of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from efficient_dl.comm import Plan
from efficient_dl.config import Config

AUXILIARY = "auxiliary."  # what the names of heads begin with that the model does not have


def check_overrides(config: Config, names: Sequence[str]) -> None:
    """Raise ConfigError if a pattern matches no parameter. names: the model's, from `named_parameters()`."""
    auxiliary = [] if config.local.mode == "end-to-end" else [f"{AUXILIARY}head.weight"]
    overrides = config.compression.overrides_by_pattern()
    Plan.of("identity", overrides=overrides).check_names([*names, *auxiliary])


def wishes_of(
    config: Config, block: nn.Module, names: Mapping[str, str], values: int, values_beside: int
) -> Config:
    """The configuration for the compression of one partition.

    block: with the parameters "body.KEY" and "head.KEY"; names: the model's name of each body key. values: how many it
    has; values_beside: those of all partitions that the worker trains in the same steps, this one's among them, which
    share its bytes.
    """
    wish = config.compression
    patterns = wish.overrides_by_pattern()
    own: list[str] = []
    for name, _ in block.named_parameters():
        part, _, key = name.partition(".")
        known = names[key] if part == "body" else f"{AUXILIARY}{name}"
        bits = next((bits for pattern, bits in patterns.items() if fnmatchcase(known, pattern)), None)
        own += [] if bits is None else [f"{name}={bits}"]
    share = wish.bytes_per_step * values // max(values_beside, 1)
    compression = dataclasses.replace(
        wish,
        overrides=", ".join(own),
        bytes_per_step=max(share, 1) if wish.bytes_per_step else 0,
    )
    return dataclasses.replace(config, compression=compression)
