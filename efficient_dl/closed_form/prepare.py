"""From rows on some ranks to scaled tensors, and what all ranks know of all rows: scales, classes, the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficient_dl.closed_form.network import Scale, deviation
from efficient_dl.closed_form.ranks import Ranks

Array = NDArray[Any]


@dataclass(frozen=True)
class Prepared:
    """This rank's rows: x (rows, d) and y (rows, c), float64, scaled by what all ranks' rows say."""

    x: Tensor
    y: Tensor
    inputs: Scale
    targets: Scale
    seed: int


def prepare(x: Array, y: Array, seed: int, ranks: Ranks, *, scale_targets: bool) -> Prepared:
    """x: (rows, d), y: (rows, c). Columns get mean 0 and variance 1 over all ranks; one-hot targets only mean 0.

    One round of communication: 2 (d + c) + 2 numbers a rank.
    """
    tensors = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    both = torch.cat(tensors, dim=1)
    mean = both.mean(0)
    own = {
        "rows": len(both),
        "mean": mean.tolist(),
        "squares": (both - mean).square().sum(0).tolist(),
        "seed": seed,
    }
    everyone = ranks.gather(own)
    inputs, targets = _scales(everyone, x.shape[1])
    if not scale_targets:
        targets = Scale(targets.mean, torch.ones_like(targets.std))
    return Prepared(inputs(tensors[0]), targets(tensors[1]), inputs, targets, int(everyone[0]["seed"]))


def _scales(everyone: list[dict[str, Any]], num_inputs: int) -> tuple[Scale, Scale]:
    """Means and deviations over all ranks: sums of squares about each rank's mean do not cancel (Chan et al. 1979)."""
    rows = torch.tensor([one["rows"] for one in everyone], dtype=torch.float64)[:, None]
    means = torch.tensor([one["mean"] for one in everyone], dtype=torch.float64)
    squares = torch.tensor([one["squares"] for one in everyone], dtype=torch.float64)
    total = rows.sum()
    mean = (rows * means).sum(0) / total
    std = deviation((squares + rows * (means - mean).square()).sum(0) / total)
    return Scale(mean[:num_inputs], std[:num_inputs]), Scale(mean[num_inputs:], std[num_inputs:])


def all_classes(own: Array, ranks: Ranks) -> Array:
    """The sorted labels of all ranks."""
    if ranks.world_size == 1:
        return own
    labels = [label for labels in ranks.gather(own.tolist()) for label in labels]
    return np.unique(np.array(labels, dtype=object if own.dtype == object else None))


def one_hot(labels: Array, classes: Array) -> Array:
    """(rows, classes), float64; raises ValueError for a label that is none of the classes."""
    strangers = np.setdiff1d(labels, classes)
    if len(strangers):
        raise ValueError(f"labels {strangers[:3].tolist()} are none of the classes {classes[:10].tolist()}")
    return np.eye(len(classes))[np.searchsorted(classes, labels)]
