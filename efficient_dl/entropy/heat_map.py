"""A picture of entropies: tensors from top to bottom, steps from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from efficient_dl.entropy.estimators import RULES
from efficient_dl.errors import ConfigError

if TYPE_CHECKING:
    from efficient_dl.entropy.observer import Row

_INCHES_A_ROW = 0.16
_MAX_LABELS = 80  # rows of a panel that are named; beyond, every second one, and so on


def draw_heat_map(history: Sequence[Sequence[Row]], path: str | Path, rule: str = "range") -> None:
    """Draw the measurements, oldest first, under one rule of RULES; a panel for each kind of tensor.

    What is not known is left white. Raises ConfigError for another rule and where nothing has been measured.
    """
    if rule not in RULES:
        raise ConfigError(f"there is no rule {rule!r}", expected=" | ".join(RULES), found=rule)
    kinds = list(dict.fromkeys(row.kind for rows in history for row in rows))
    if not kinds:
        raise ConfigError(
            "there is nothing to draw yet",
            expected="at least one measurement",
            found=f"{len(history)} without tensors",
            fix="draw after the first optimizer step; tensors below min_numel are left out",
        )
    names = {
        kind: list(dict.fromkeys(r.name for rows in history for r in rows if r.kind == kind))
        for kind in kinds
    }
    heights = [max(1.0, _INCHES_A_ROW * len(names[kind])) for kind in kinds]
    figure = Figure(figsize=(9, sum(heights) + 0.9 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
    steps = [rows[0].step if rows else 0 for rows in history]
    for kind, axes in zip(kinds, panels, strict=True):
        position = {name: index for index, name in enumerate(names[kind])}
        grid = [[math.nan] * len(history) for _ in position]
        for column, rows in enumerate(history):
            for row in rows:
                if row.kind == kind:
                    grid[position[row.name]][column] = getattr(row, rule)
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
        shown = range(0, len(history), max(1, len(history) // 8))
        axes.set_xticks(list(shown), [str(steps[index]) for index in shown])
        every = max(1, math.ceil(len(position) / _MAX_LABELS))
        axes.set_yticks(range(0, len(position), every), names[kind][::every], fontsize=6)
        axes.set_title(kind, fontsize=9)
        figure.colorbar(image, ax=axes, label="bits a value")
    panels[-1].set_xlabel(f"optimizer step; quantizer's step by the rule '{rule}'")
    figure.savefig(path)
