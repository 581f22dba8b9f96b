"""Draws benchmarks/results/communication.jsonl: what a step takes with each system, a panel for each model and link.

python -m benchmarks.plot_communication benchmarks/results/communication.jsonl benchmarks/results/communication.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.communication import BENCH
from benchmarks.communication_cell import COMPUTE, OURS, SYSTEMS

_COLUMNS = 4


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.communication", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A bar a system: the step without communication, and what communication adds to it."""
    seconds: dict[str, dict[str, float]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == BENCH and row["metric"] == "step_seconds":
            if row["system"] == COMPUTE:  # a cell's first row: it takes the place of an earlier session's
                seconds[row["case"]] = {}
            seconds[row["case"]][row["system"]] = row["value"]
    if not seconds:
        raise typer.BadParameter("there are no rows of step times")
    columns = min(_COLUMNS, len(seconds))
    lines = -(-len(seconds) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.2 * lines), squeeze=False)
    for axis, (case, found) in zip(axes.flat, seconds.items(), strict=False):
        systems = [system for system in reversed(SYSTEMS) if system in found]
        compute = found[COMPUTE]
        exposed = [1000 * max(found[system] - compute, 0.0) for system in systems]
        colours = ["tab:green" if system in OURS else "tab:grey" for system in systems]
        axis.barh(systems, [1000 * compute] * len(systems), color="lightsteelblue")
        axis.barh(systems, exposed, left=1000 * compute, color=colours)
        axis.set_title(case, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms a step: compute, then what communication adds", fontsize=7)
    for axis in axes.flat[len(seconds) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
