"""Draws benchmarks/results/closed_form.jsonl: accuracy over CPU seconds for each data set, and over the width.

python -m benchmarks.plot_closed_form benchmarks/results/closed_form.jsonl benchmarks/results/closed_form.svg
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.studies import cases_of, seeds_of, systems_of

_COLUMNS = 3
_WIDTH = ", width "  # in the names of the sweep's cases


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.closed_form", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A panel for each data set, means over seeds, and one for the sweep of widths if there is one."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    cases = [case for case in cases_of(found) if _WIDTH not in case]
    swept = [case for case in cases_of(found) if _WIDTH in case]
    panels = len(cases) + bool(swept)
    lines = -(-panels // _COLUMNS)
    figure, axes = plt.subplots(lines, _COLUMNS, figsize=(5.2 * _COLUMNS, 3.4 * lines), squeeze=False)
    for panel, case in zip(axes.flat, cases, strict=False):
        _over_seconds(panel, found, case)
    if swept:
        _over_width(axes.flat[len(cases)], found, swept)
    for panel in axes.flat[:panels]:
        panel.legend(fontsize=6)
        panel.tick_params(labelsize=7)
        panel.set_ylabel("test accuracy, percent", fontsize=7)
    for panel in axes.flat[panels:]:
        panel.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _over_seconds(panel: plt.Axes, rows: list[dict[str, Any]], case: str) -> None:
    for system in systems_of(rows, case):
        accuracy = list(seeds_of(rows, case, system, "accuracy").values())
        seconds = list(seeds_of(rows, case, system, "cpu_seconds").values())
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        mark = "s" if "sgd" in system else "o"
        panel.errorbar(
            statistics.mean(seconds),
            statistics.mean(accuracy),
            yerr=spread,
            fmt=mark,
            markersize=5,
            label=system,
        )
    panel.set_xscale("log")
    panel.set_xlabel("CPU seconds; bars: one standard deviation of seeds", fontsize=7)
    panel.set_title(case, fontsize=8)


def _over_width(panel: plt.Axes, rows: list[dict[str, Any]], cases: list[str]) -> None:
    widths = [int(case.rpartition(_WIDTH)[2]) for case in cases]
    for system in systems_of(rows, cases[0]):
        for metric, style in (("accuracy", "-o"), ("train_accuracy", ":")):
            means = [statistics.mean(seeds_of(rows, case, system, metric).values()) for case in cases]
            colour = None if metric == "accuracy" else panel.lines[-1].get_color()
            label = system if metric == "accuracy" else f"{system}, training rows"
            panel.plot(widths, means, style, color=colour, markersize=4, label=label)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("width", fontsize=7)
    panel.set_title(cases[0].rpartition(_WIDTH)[0], fontsize=8)


if __name__ == "__main__":
    typer.run(main)
