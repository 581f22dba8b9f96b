"""Draws benchmarks/results/partitionwise.jsonl: held-out loss against composed seconds, a panel for each link.

python -m benchmarks.plot_partitionwise benchmarks/results/partitionwise.jsonl benchmarks/results/partitionwise.svg
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

from benchmarks.partitionwise_report import curves_and_rounds
from benchmarks.partitionwise_runs import SYSTEMS


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.partitionwise", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """Smoothed loss after a step, each seed a line, at the step's number times the median seconds of one on that link.

    Of the sizes of a step a dotted line is the larger one.
    """
    panels = curves_and_rounds([json.loads(line) for line in rows.read_text().splitlines()])
    if not panels:
        raise typer.BadParameter("there are no rows of losses and step times")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 3.8 * lines), squeeze=False)
    colours = dict(zip(SYSTEMS, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for axis, (title, seeds, rounds) in zip(axes.flat, panels, strict=False):
        named: set[tuple[str, str]] = set()
        sizes = sorted(
            {size for found in seeds.values() for size, _ in found}, key=lambda one: (len(one), one)
        )
        for found in seeds.values():
            for (size, system), curve in found.items():
                taken = [one[size, system] for one in rounds if (size, system) in one]
                if not taken:
                    continue
                seconds = statistics.median(taken)
                axis.plot(
                    [step * seconds for step in curve.steps],
                    curve.losses,
                    color=colours[system],
                    linestyle=":" if size != sizes[0] else "-",
                    linewidth=1,
                    label=f"{system}, {size}, {1000 * seconds:.0f} ms a step"
                    if (size, system) not in named
                    else None,
                )
                named.add((size, system))
        axis.set_xscale("log")
        axis.set_xlabel("seconds: steps x a step's median")
        axis.set_ylabel("held-out loss, nats, mean of five")
        axis.set_title(title, fontsize=8)
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
