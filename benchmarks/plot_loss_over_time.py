"""Draws loss against wall-clock time: losses of benchmarks.loss_over_time, seconds of benchmarks.communication.

python -m benchmarks.plot_loss_over_time LOSSES.jsonl STEPS.jsonl OUT.svg
Also prints when each system is at the loss that native fp32 ends with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from rich.console import Console
from rich.table import Table

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks import communication
from benchmarks.communication_cell import COMPUTE, NATIVE, OURS
from benchmarks.loss_over_time import BENCH

Curve = list[tuple[int, float]]  # (step, held-out loss)


def read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """By model and ranks ("gpt-micro, 2"), then by system."""
    curves: dict[str, dict[str, Curve]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == BENCH:
            model, ranks, _, _, step = row["case"].split(", ")
            points = curves.setdefault(f"{model}, {ranks.split()[0]}", {}).setdefault(row["system"], [])
            points.append((int(step.split()[1]), row["value"]))
    return curves


def read_steps(path: Path) -> dict[str, dict[str, float]]:
    """A step's seconds by case ("gpt-micro, 2 hosts, 100mbit"), then by system."""
    seconds: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == communication.BENCH and row["metric"] == "step_seconds":
            seconds.setdefault(row["case"], {})[row["system"]] = row["value"]
    return seconds


def seconds_to(loss: float, curve: Curve, step_seconds: float) -> float | None:
    """When a system's loss is first at or below this one, on a straight line between measurements; None: never."""
    before: tuple[int, float] | None = None
    for step, found in sorted(curve):
        if found <= loss:
            if before is None or found == before[1]:
                return step * step_seconds
            share = (before[1] - loss) / (before[1] - found)
            return (before[0] + share * (step - before[0])) * step_seconds
        before = (step, found)
    return None


def main(
    losses: Annotated[Path, typer.Argument(help="rows of benchmarks.loss_over_time", exists=True)],
    steps: Annotated[Path, typer.Argument(help="rows of benchmarks.communication", exists=True)],
    out: Annotated[Path, typer.Argument(help="the picture to write, .svg, .png or .pdf")],
) -> None:
    """A panel a link; a curve a system."""
    curves = read_curves(losses)
    cells = {
        case: found for case, found in read_steps(steps).items() if case.partition(" hosts")[0] in curves
    }
    if not cells:
        raise typer.BadParameter("no model and number of ranks is in both files")
    figure, axes = plt.subplots(1, len(cells), figsize=(4.5 * len(cells), 4), squeeze=False, sharey=True)
    for axis, (case, seconds) in zip(axes[0], cells.items(), strict=True):
        trained = curves[case.partition(" hosts")[0]]
        _print(case, trained, seconds)
        for system, curve in trained.items():
            if system in seconds:
                style = "-" if system in OURS else "--"
                axis.plot(
                    [step * seconds[system] for step, _ in curve],
                    [loss for _, loss in curve],
                    style,
                    label=system,
                )
        axis.set_xscale("log")
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("seconds of training")
    axes[0][0].set_ylabel("held-out loss, nats")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _print(case: str, trained: Mapping[str, Curve], seconds: Mapping[str, float]) -> None:
    goal = trained[NATIVE][-1][1]
    native = seconds_to(goal, trained[NATIVE], seconds[NATIVE])
    assert native is not None
    table = Table(
        title=f"{case}: at native's last loss, {goal:.4f}",
        caption=f"compute alone {seconds[COMPUTE]:.3f} s a step",
    )
    for name in ("system", "s/step", "last loss", "seconds", "times native's speed"):
        table.add_column(name, justify="right")
    for system, curve in trained.items():
        if system not in seconds:
            continue
        found = seconds_to(goal, curve, seconds[system])
        cells = ("never", "") if found is None else (f"{found:.1f}", f"{native / found:.2f}")
        table.add_row(system, f"{seconds[system]:.3f}", f"{curve[-1][1]:.4f}", *cells)
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    typer.run(main)
