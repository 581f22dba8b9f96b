"""Draws rows of benchmarks.objectives: each objective's steps to the target, seed by seed.

python -m benchmarks.plot_objectives benchmarks/results/objectives.jsonl objectives.svg
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

from benchmarks.objectives import BENCH, REFERENCE, short
from benchmarks.verdicts import by_seed, systems


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.objectives", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """One panel a case: a point a seed, a bar for the mean; a run that never arrives counts as beyond the end."""
    found = [row for row in map(json.loads, rows.read_text().splitlines()) if row["bench"] == BENCH]
    cases = list(by_seed(found, REFERENCE, "steps_to_target"))
    figure, panels = plt.subplots(
        1, max(1, len(cases)), figsize=(4.4 * max(1, len(cases)), 3.4), squeeze=False
    )
    for panel, case in zip(panels[0], cases, strict=False):
        for place, name in enumerate(systems(found)):
            values = list(by_seed(found, name, "steps_to_target").get(case, {}).values())
            if values:
                panel.bar(
                    place,
                    statistics.mean(values),
                    color="tab:grey" if name == REFERENCE else "tab:blue",
                    alpha=0.4,
                )
                panel.plot([place] * len(values), values, "ok", markersize=3)
        panel.set_xticks(range(len(systems(found))), systems(found), rotation=30, ha="right", fontsize=7)
        panel.set_ylabel("optimizer steps", fontsize=8)
        panel.set_title(short(case), fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
