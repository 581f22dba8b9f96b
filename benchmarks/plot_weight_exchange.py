"""Draws rows of benchmarks.weight_exchange: entropies over training, and what an exchange saves at what accuracy.

python -m benchmarks.plot_weight_exchange benchmarks/results/weight_exchange.jsonl weight_exchange.svg
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

from benchmarks.verdicts import by_seed, differences
from benchmarks.weight_exchange import BENCH, EXACT, FIRST_BITS, TARGET_RATIO, cell_of, curve_steps
from efficient_dl.entropy import RULES


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.weight_exchange", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A panel for each rule's entropy (means over seeds), and one for ratio against the change in accuracy."""
    found = [row for row in map(json.loads, rows.read_text().splitlines()) if row["bench"] == BENCH]
    steps = curve_steps(found)
    figure, panels = plt.subplots(1, len(RULES) + 1, figsize=(3.2 * (len(RULES) + 1), 3.4))
    for panel, rule in zip(panels, RULES, strict=False):
        curves: dict[str, list[float]] = {}
        for step in steps:
            for case, values in by_seed(found, EXACT, f"entropy_{rule}_at_{step}").items():
                curves.setdefault(case, []).append(statistics.mean(values.values()))
        for case, curve in curves.items():
            panel.plot(steps, curve, label=cell_of(case))
        panel.set_title(f"entropy, step by '{rule}'", fontsize=8)
        panel.set_xlabel("optimizer step", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("bits a weight", fontsize=8)
    panels[0].legend(fontsize=6)
    exact = by_seed(found, EXACT, "accuracy")
    for system in FIRST_BITS:
        ratios, accuracies = by_seed(found, system, "ratio"), by_seed(found, system, "accuracy")
        points = [
            (statistics.mean(ratios[case].values()), 100 * differences(accuracies[case], exact[case])[0])
            for case in ratios
        ]
        if points:
            panels[-1].plot(*zip(*points, strict=True), "o", label=system)
    panels[-1].axvline(TARGET_RATIO, color="grey", linewidth=0.8, linestyle=":")
    panels[-1].axhline(0, color="grey", linewidth=0.8)
    panels[-1].set_xlabel("fp32 bytes / bytes sent", fontsize=8)
    panels[-1].set_title("accuracy against fp32, points", fontsize=8)
    panels[-1].tick_params(labelsize=7)
    panels[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
