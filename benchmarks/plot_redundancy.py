"""Draws rows of benchmarks.redundancy: accuracy of each partition against the share of examples that it learned from.

python -m benchmarks.plot_redundancy benchmarks/results/redundancy.jsonl redundancy.svg
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.redundancy import BENCH, EVERYTHING
from benchmarks.verdicts import Rows, by_seed, systems


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.redundancy", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A panel for each partition, a line for each way of choosing: means over seeds, bars of a standard deviation."""
    found = [row for row in map(json.loads, rows.read_text().splitlines()) if row["bench"] == BENCH]
    blocks = sorted({str(row["metric"]) for row in found if str(row["metric"]).startswith("accuracy_block_")})
    figure, panels = plt.subplots(
        1, max(1, len(blocks)), figsize=(3.6 * max(1, len(blocks)), 3.4), squeeze=False
    )
    for panel, metric in zip(panels[0], blocks, strict=False):
        for by in ("loss", "random"):
            names = [one for one in systems(found) if one == EVERYTHING or one.endswith(f"by {by}")]
            kept = [_mean(found, one, metric.replace("accuracy", "kept_by")) for one in names]
            values = [_values(found, one, metric) for one in names]
            panel.errorbar(
                kept,
                [100 * statistics.mean(one) for one in values],
                yerr=[100 * statistics.stdev(one) if len(one) > 1 else 0.0 for one in values],
                marker="o",
                capsize=3,
                label=f"chosen by {by}" if by == "loss" else "at random",
            )
        panel.set_title(f"partition {metric.rpartition('_')[2]}", fontsize=8)
        panel.set_xlabel("share of examples that it learned from", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0][0].set_ylabel("accuracy of its head, %", fontsize=8)
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _values(rows: Rows, system: str, metric: str) -> list[float]:
    return [value for of_case in by_seed(rows, system, metric).values() for value in of_case.values()]


def _mean(rows: Rows, system: str, metric: str) -> float:
    return statistics.mean(_values(rows, system, metric))


if __name__ == "__main__":
    typer.run(main)
