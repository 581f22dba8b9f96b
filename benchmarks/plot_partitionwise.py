"""Draws benchmarks/results/partitionwise.jsonl: held-out loss against composed seconds, a panel for each link.

python -m benchmarks.plot_partitionwise benchmarks/results/partitionwise.jsonl benchmarks/results/partitionwise.svg
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.partitionwise_report import Measured, curves, read_rows, step_seconds
from benchmarks.partitionwise_runs import CASES, SYSTEMS, Case

_TIMED = re.compile(r"(?P<title>.*), (?P<ranks>\d+) ranks, (?P<rate>\w+), round 0")


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.partitionwise", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """Loss after a step, by whole runs of seed 0, at the step's number times the median seconds of one on that link."""
    measured = read_rows(rows)
    panels = [(case, ranks, rate) for case in CASES.values() for ranks, rate in _timed(case, measured)]
    if not panels:
        raise typer.BadParameter("there are no rows of step times")
    columns = max(1, math.ceil(len(panels) / len({id(case) for case, _, _ in panels})))
    figure, axes = plt.subplots(
        math.ceil(len(panels) / columns), columns, figsize=(4 * columns, 3.4 * math.ceil(len(panels) / columns)),
        squeeze=False,
    )  # fmt: skip
    colours = dict(zip(SYSTEMS, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for axis, (case, ranks, rate) in zip(axes.flat, panels, strict=False):
        for system, curve in curves(case, ranks, 0, measured).items():
            seconds = step_seconds(case, ranks, rate, system, measured)
            axis.plot(
                [step * seconds for step in curve.steps],
                curve.losses,
                color=colours[system],
                label=f"{system}, {1000 * seconds:.0f} ms a step",
            )
        axis.set_xscale("log")
        axis.set_xlabel("seconds: steps x a step's median")
        axis.set_ylabel("held-out loss, nats")
        axis.set_title(f"{case.title(ranks).split(', ')[0]}, {ranks} ranks, {rate}", fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _timed(case: Case, measured: Measured) -> list[tuple[int, str]]:
    """The numbers of ranks and the links of which there are times of this case."""
    found: dict[tuple[int, str], None] = {}
    for where, _, metric in measured:
        match = _TIMED.fullmatch(where)
        if match and metric == "step_seconds":
            ranks = int(match["ranks"])
            if where.startswith(case.title(ranks)):
                found[ranks, match["rate"]] = None
    return list(found)


if __name__ == "__main__":
    typer.run(main)
