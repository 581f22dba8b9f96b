"""Draws benchmarks/results/partitionwise.jsonl: held-out loss against composed seconds, a panel for each link.

python -m benchmarks.plot_partitionwise benchmarks/results/partitionwise.jsonl benchmarks/results/partitionwise.svg
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.partitionwise_report import MIDDLE, Curve, Key, curves_and_rounds, target
from benchmarks.partitionwise_runs import NATIVE, SYSTEMS


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.partitionwise", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """Smoothed loss after a step, each seed a line, at the step's number times the median seconds of one on that link.

    Each system with the size of steps at which it is first at the target, which is dashed.
    """
    panels = curves_and_rounds([json.loads(line) for line in rows.read_text().splitlines()])
    if not panels:
        raise typer.BadParameter("there are no rows of losses and step times")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 3.8 * lines), squeeze=False)
    colours = dict(zip(SYSTEMS, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for axis, (title, seeds, rounds) in zip(axes.flat, panels, strict=False):
        seconds = {
            key: statistics.median([one[key] for one in rounds if key in one])
            for key in {key for one in rounds for key in one}
        }
        for system in SYSTEMS:
            sizes = {
                size
                for found in seeds.values()
                for size, name in found
                if (size, name) in seconds and name == system
            }
            if not sizes:
                continue
            size = min(
                sorted(sizes), key=lambda one: _seconds_to_target(seeds.values(), seconds, (one, system))
            )
            of_seeds = [found[size, system] for found in seeds.values() if (size, system) in found]
            taken = seconds[size, system]
            for number, curve in enumerate(of_seeds):
                axis.plot(
                    [step * taken for step in curve.steps],
                    curve.losses,
                    color=colours[system],
                    linewidth=1,
                    label=None if number else f"{system}, {size}, {1000 * taken:.0f} ms",
                )
        goals = [
            target(found, MIDDLE) for found in seeds.values() if any(name == NATIVE for _, name in found)
        ]
        for goal in goals:
            axis.axhline(goal, color="grey", linewidth=0.7, linestyle="--")
        if goals:
            axis.set_ylim(top=2 * max(goals))  # what comes before is the same for all
        axis.set_xscale("log")
        axis.set_xlabel("seconds: steps x a step's median")
        axis.set_ylabel("held-out loss, nats, mean of five")
        axis.set_title(title, fontsize=8)
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _seconds_to_target(
    seeds: Iterable[dict[Key, Curve]], seconds: dict[Key, float], key: Key
) -> tuple[float, float]:
    """The median over seeds; for what never gets there its last loss decides."""
    found = [one for one in seeds if key in one and any(name == NATIVE for _, name in one)]
    to_target = [one[key].steps_to(target(one, MIDDLE)) * seconds[key] for one in found]
    return (
        statistics.median(to_target) if to_target else math.inf,
        statistics.median(one[key].losses[-1] for one in found) if found else math.inf,
    )


if __name__ == "__main__":
    typer.run(main)
