"""Draws benchmarks/results/local_learning.jsonl: what memory a step needs against what it costs in quality.

python -m benchmarks.plot_local_learning benchmarks/results/local_learning.jsonl benchmarks/results/local_learning.svg
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.local_learning import BENCH, BUDGETS, METRIC, REFERENCE, gap, short
from benchmarks.local_systems import SAME, SYSTEMS
from benchmarks.verdicts import by_seed


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.local_learning", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A row a budget, a column a case: a step's memory against the gap to backprop, 95 % interval over paired seeds."""
    known = [row for line in rows.read_text().splitlines() if (row := json.loads(line))["bench"] == BENCH]
    live = {
        (row["case"].removesuffix(", costs"), row["system"]): row["value"]
        for row in known
        if row["metric"] == "live_peak_bytes"
    }
    metric_of = {case: metric for metric in METRIC.values() for case in by_seed(known, REFERENCE, metric)}
    budgets = [one for one in BUDGETS if any(case.endswith(f"equal {one}") for case in metric_of)]
    columns = list(dict.fromkeys(case.rpartition(", equal ")[0] for case in metric_of))
    figure, panels = plt.subplots(
        len(budgets), len(columns), figsize=(5.2 * len(columns), 4 * len(budgets)), squeeze=False
    )
    named: dict[str, Any] = {}
    colours = dict(zip(SYSTEMS, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for panel, (budget, column) in zip(panels.flat, itertools.product(budgets, columns), strict=True):
        case = f"{column}, equal {budget}"
        if case not in metric_of:
            panel.set_axis_off()
            continue
        metric = metric_of[case]
        title = next(one for one, system in live if system == REFERENCE and case.startswith(one + ", "))
        backprop = by_seed(known, REFERENCE, metric)[case]
        for system, colour in colours.items():
            source = SAME.get(system, system) if budget == "tokens" else system
            theirs = by_seed(known, source, metric).get(case, {})
            if not theirs or (title, system) not in live:
                continue
            mean, half = gap(metric, theirs, backprop)
            if not math.isfinite(mean):
                print(f"{system}, {case}: a run diverged; not drawn")
                continue
            panel.errorbar(
                live[title, system] / live[title, REFERENCE],
                mean,
                yerr=half if math.isfinite(half) and system != REFERENCE else None,
                marker="o",
                linestyle="none",
                capsize=3,
                color=colour,
                label=f"{system} ({len(theirs.keys() & backprop.keys())})",
            )
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_yscale("symlog", linthresh=1.0)
        panel.set_xlim(left=0)
        panel.set_xlabel("memory that a step needs, a part of backprop's")
        panel.set_ylabel(
            "points of accuracy below backprop" if metric == "accuracy" else "% more bits than backprop"
        )
        panel.set_title(short(case), fontsize=8)
        panel.margins(y=0.12)
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        named.values(), named.keys(), title="system (paired seeds)", loc="lower center", ncols=5, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.12 if len(budgets) > 1 else 0.22, 1, 1))
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
