"""Draws benchmarks/results/depth.jsonl: what each regularizer does to the test error, and to the effective rank.

python -m benchmarks.plot_depth benchmarks/results/depth.jsonl benchmarks/results/depth.svg
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

from benchmarks.depth_completion import CASE
from benchmarks.depth_images import LOCAL
from benchmarks.studies import cases_of, paired, seeds_of, systems_of

_COLUMNS = 3


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.depth", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A panel for each data set: accuracy against local training by seed, with 95 % intervals; the matrices first."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    cases = cases_of(found)
    lines = -(-len(cases) // _COLUMNS)
    figure, axes = plt.subplots(lines, _COLUMNS, figsize=(5.2 * _COLUMNS, 3.3 * lines), squeeze=False)
    for panel, case in zip(axes.flat, cases, strict=False):
        if case == CASE:
            _completion(panel, found)
        else:
            _images(panel, found, case)
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
    for panel in axes.flat[len(cases) :]:
        panel.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _completion(panel: plt.Axes, rows: list[dict[str, Any]]) -> None:
    for place, system in enumerate(names := systems_of(rows, CASE)):
        errors = list(seeds_of(rows, CASE, system, "test_error").values())
        panel.plot(errors, [place] * len(errors), "o", color="tab:blue", alpha=0.5, markersize=4)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("error of unseen entries, percent", fontsize=7)
    panel.set_title(CASE, fontsize=8)


def _images(panel: plt.Axes, rows: list[dict[str, Any]], case: str) -> None:
    local = seeds_of(rows, case, LOCAL, "test_accuracy")
    names: list[str] = []
    for system in systems_of(rows, case):
        accuracy = seeds_of(rows, case, system, "test_accuracy")
        if system == LOCAL or len(local) < 2 or accuracy.keys() != local.keys():
            continue
        gain = paired(accuracy, local)
        rank = statistics.mean(seeds_of(rows, case, system, "effective_rank").values())
        colour = "tab:orange" if not system.startswith(LOCAL) else "tab:blue"
        panel.errorbar(
            gain.mean, len(names), xerr=gain.half_width, fmt="o", color=colour, markersize=4, capsize=2
        )
        names.append(f"{system.removeprefix(f'{LOCAL} + ')} (rank {rank:.0f})")
    panel.axvline(0, color="grey", linewidth=0.8)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel(f"test accuracy − that of {LOCAL}, points, 95 %", fontsize=7)
    panel.set_title(case, fontsize=8)


if __name__ == "__main__":
    typer.run(main)
