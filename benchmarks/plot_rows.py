"""Draws any file of rows: a panel for each metric that has seeds, each system's values and their mean.

python -m benchmarks.plot_rows benchmarks/results/depth.jsonl depth.svg
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.verdicts import interval_text

MAX_PANELS, MAX_LINES = 12, 24
_WIDTH, _LINE = 9.0, 0.24  # inches


def main(
    rows: Annotated[Path, typer.Argument(help="rows as benchmarks.rows writes them", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """One panel a (case, metric), at most MAX_PANELS, those with the most values; the title says how many there are."""
    panels: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        case = row["case"].rpartition(", seed ")[0] or row["case"]
        if row["value"] is not None:
            values = panels.setdefault((case, row["metric"], row["unit"]), {})
            values.setdefault(row["system"], []).append(row["value"])
    several = {key: values for key, values in panels.items() if len(values) > 1} or panels
    chosen = sorted(several, key=lambda key: -sum(map(len, several[key].values())))[:MAX_PANELS]
    heights = [1.0 + _LINE * min(MAX_LINES, len(several[key])) for key in chosen]
    figure, axes = plt.subplots(
        max(1, len(chosen)),
        1,
        figsize=(_WIDTH, sum(heights) or 1.0),
        squeeze=False,
        height_ratios=heights or None,
    )
    for panel, key in zip(axes[:, 0], chosen, strict=False):
        _draw(panel, key, several[key])
    if len(several) > len(chosen):
        figure.suptitle(f"{len(chosen)} of {len(several)} metrics", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _draw(panel: plt.Axes, key: tuple[str, str, str], values: dict[str, list[float]]) -> None:
    case, metric, unit = key
    names = list(values)[:MAX_LINES]
    for place, name in enumerate(names):
        numbers = values[name]
        panel.plot(numbers, [place] * len(numbers), "o", color="tab:blue", alpha=0.4, markersize=4)
        panel.plot([statistics.mean(numbers)], [place], "|", color="black", markersize=12)
    labels = [f"{name}  {interval_text(statistics.mean(values[name]), math.nan, '.4g')}" for name in names]
    panel.set_yticks(range(len(names)), labels, fontsize=7)
    panel.invert_yaxis()
    panel.set_title(f"{case}: {metric}", fontsize=8)
    panel.set_xlabel(unit, fontsize=7)


if __name__ == "__main__":
    typer.run(main)
