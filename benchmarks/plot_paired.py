"""Draws benchmarks/results/paired.jsonl: what each system sends against what it costs in loss.

python -m benchmarks.plot_paired benchmarks/results/paired.jsonl benchmarks/results/paired.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.paired import BENCH, REFERENCE


def main(
    rows: Annotated[Path, typer.Argument(help="rows of benchmarks.paired", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """One point a seed: megabytes sent a step, by the kernel's counter, against the relative difference in loss."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == BENCH and ", seed " in row["case"]:
            values.setdefault((row["case"], row["system"]), {})[row["metric"]] = row["value"]
    cases = sorted({case.rpartition(", seed ")[0] for case, _ in values})
    if len(cases) != 1:
        raise typer.BadParameter(f"expected rows of one case, found {cases}")
    figure, axes = plt.subplots(figsize=(7, 4))
    for system in dict.fromkeys(system for _, system in values):
        points = [
            (
                1e-6 * one["kernel_bytes_per_step"],
                100 * (one["val_loss"] / values[case, REFERENCE]["val_loss"] - 1),
            )
            for (case, name), one in values.items()
            if name == system and (case, REFERENCE) in values
        ]
        axes.plot(*zip(*points, strict=True), "o", alpha=0.7, label=system)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MB sent a step, all ranks (kernel's counter)")
    axes.set_ylabel("held-out loss against native fp32, %")
    axes.set_title(cases[0], fontsize=9)
    axes.legend(title="bits or torch's hook")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
