"""Draws benchmarks/results/local_learning.jsonl: what each system saves for backward against what it costs in loss.

python -m benchmarks.plot_local_learning benchmarks/results/local_learning.jsonl benchmarks/results/local_learning.svg
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.local_learning import BENCH, BUDGETS, REFERENCE
from benchmarks.local_systems import SYSTEMS
from benchmarks.pairs import paired_difference


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.local_learning", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A row a budget, a column a case: saved bytes against the relative difference in loss, with its 95 % interval."""
    costs: dict[tuple[str, str], float] = {}
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] != BENCH:
            continue
        if row["metric"] == "saved_peak_bytes":
            costs[row["case"].removesuffix(", costs"), row["system"]] = row["value"]
        if row["metric"] == "val_loss":
            case, _, seed = row["case"].rpartition(", seed ")
            losses.setdefault((case, row["system"]), {})[int(seed)] = row["value"]
    cases = list(dict.fromkeys(case for case, _ in losses))
    budgets = [one for one in BUDGETS if any(case.endswith(f"equal {one}") for case in cases)]
    columns = list(dict.fromkeys(case.rpartition(", equal ")[0] for case in cases))
    figure, panels = plt.subplots(
        len(budgets), len(columns), figsize=(5.2 * len(columns), 4 * len(budgets)), squeeze=False
    )
    colours = dict(zip(SYSTEMS, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for panel, (budget, column) in zip(panels.flat, itertools.product(budgets, columns), strict=True):
        case = f"{column}, equal {budget}"
        if case not in cases:
            panel.set_axis_off()
            continue
        title = next(one for one, system in costs if system == REFERENCE and case.startswith(one + ", "))
        for system, colour in colours.items():
            if (case, system) not in losses:
                continue
            seeds = losses[case, system]
            found = paired_difference(seeds, {seed: losses[case, REFERENCE][seed] for seed in seeds})
            panel.errorbar(
                costs[title, system] / costs[title, REFERENCE],
                100 * found.mean,
                yerr=100 * found.half_width if found.num_pairs > 1 else None,
                marker="o",
                linestyle="none",
                capsize=3,
                color=colour,
                label=f"{system} ({found.num_pairs})",
            )
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xlim(left=0)
        panel.set_xlabel("saved for backward, a part of backprop's")
        panel.set_ylabel("held-out loss against backprop, %")
        panel.set_title("\n".join(case.split(", ", 1)), fontsize=7)
        panel.legend(fontsize=7, title="system (paired seeds)", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
