"""Where is training faster with compression? DDP over emulated links: ours, torch's hooks, hivemind's codec.

python -m benchmarks.communication --out benchmarks/results/communication.jsonl           # some two hours on 2 cores
python -m benchmarks.communication --models gpt-micro --rates 100mbit --steps 5           # two minutes
Run nothing beside it. Every system has a model of its own: gpt-base on 4 hosts takes 26 GB. "Exposed" is what a step
takes longer than the same step without communication, under the same contention. Peers that are not installed are
named and left out (pip install hivemind). A cell that --out has of this commit and processor is not repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from benchmarks import hivemind_hook
from benchmarks.communication_cell import (
    AUTO,
    COMPUTE,
    MODELS,
    NATIVE,
    OURS,
    SYSTEMS,
    Cell,
    run_cell,
)
from benchmarks.rows import Row, RowFile, environment
from cluster.emulate import EmulatedNetwork
from efficient_dl.training import Worker, launch

BENCH = "communication"
_LINE = "cell "
_TIMEOUT_SECONDS = 3600.0
_FIXED = [name for name in OURS if name != AUTO]
_BITS_OF = {NATIVE: "none", "lossless": "lossless", "4.0": "4.0", "2.0": "2.0"}  # as the planner names them


def rows_of(case: str, cell: Cell) -> list[Row]:
    """The rows of one cell; comparisons with native are paired, step by step of one round."""
    compute = statistics.median(cell.systems[COMPUTE].seconds)
    native = cell.systems[NATIVE].seconds
    native_exposed = statistics.median(native) - compute
    rows = [Row(BENCH, case, COMPUTE, "step_seconds", compute, "s", False)]
    steps = {name: statistics.median(one.seconds) for name, one in cell.systems.items()}
    for name, one in cell.systems.items():
        if name == COMPUTE:
            continue
        exposed = steps[name] - compute
        ratios = [mine / theirs for mine, theirs in zip(one.seconds, native, strict=True)]
        values = [
            ("step_seconds", steps[name], f"s, median of {len(ratios)}", False),
            ("exposed_seconds", exposed, "s", False),
            ("nic_bytes_per_step", one.nic_bytes / len(ratios), "bytes, all ranks, by the kernel", False),
        ]
        if name != NATIVE:
            shorter = native_exposed / exposed if exposed > 0 else float("inf")
            values += [
                ("step_over_native", statistics.median(ratios), f"median of {len(ratios)} pairs", False),
                ("step_over_native_upper95", median_upper95(ratios), "of the median", False),
                ("exposed_shorter", shorter, "native's exposed / this", True),
            ]
        if name == AUTO:
            best = min(steps[other] for other in (NATIVE, *_FIXED) if other in steps)
            values.append(("step_over_best_fixed", steps[name] / best, "of native and ours", False))
        if (predicted := cell.exposed.get(_BITS_OF.get(name, ""))) is not None:
            values.append(("predicted_over_measured", (compute + predicted) / steps[name], "step", False))
        rows += [
            Row(BENCH, case, name, metric, value, unit, better) for metric, value, unit, better in values
        ]
    return rows


def median_upper95(values: list[float]) -> float:
    """The upper end of a 95 % interval of the median, by order statistics: no assumption about the distribution."""
    ordered = sorted(values)
    above = int(binom.ppf(0.975, len(ordered), 0.5))
    return ordered[min(above, len(ordered) - 1)]


def measured_cells(out: Path | None) -> dict[str, set[str]]:
    """The systems of every case in a file of rows, as far as this commit and processor have measured them."""
    found: dict[str, set[str]] = {}
    if out is not None and out.exists():
        for row in map(json.loads, out.read_text().splitlines()):
            same = all(row["env"][key] == environment()[key] for key in ("commit", "processor"))
            if same and row["bench"] == BENCH and row["metric"] == "step_seconds":
                found.setdefault(row["case"], set()).add(row["system"])
    return found


def worker(model: str, systems: list[str], steps: int, seconds: float) -> None:
    """One rank of a cell; rank 0 prints it as a line of JSON."""

    def main(worker: Worker) -> None:
        cell = run_cell(worker, model, systems, steps, seconds)
        if worker.rank == 0:
            print(f"{_LINE}{cell.to_json()}", flush=True)

    launch(1, main)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    models: Annotated[str, typer.Option(help="of " + ", ".join(MODELS))] = "gpt-small,resnet18-base,gpt-base",
    hosts: Annotated[str, typer.Option(help="numbers of hosts, a rank on each")] = "2,4",
    rates: Annotated[str, typer.Option(help="link speeds")] = "100mbit,1gbit,2.5gbit,none",
    systems: Annotated[str, typer.Option(help="what to compare with native fp32")] = ",".join(SYSTEMS[1:]),
    steps: Annotated[int, typer.Option(help="timed steps of each system", min=5)] = 20,
    minutes: Annotated[float, typer.Option(help="of a cell, then fewer steps, but five", min=0.1)] = 10.0,
    as_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Times training steps over emulated links and compares the planner's predictions with them."""
    names = _installed([name.strip() for name in systems.split(",")])
    if as_worker:
        return worker(models, names, steps, 60 * minutes)
    file, there = RowFile(out), measured_cells(out)
    for model in models.split(","):
        for ranks in map(int, hosts.split(",")):
            for rate in rates.split(","):
                case = f"{model}, {ranks} hosts, {'unshaped' if rate == 'none' else rate}"
                if there.get(case, set()).issuperset(names):
                    print(f"{case}: measured already, in {out}", file=sys.stderr)
                    continue
                command = [sys.executable, "-m", "benchmarks.communication", "--worker", "--models", model]
                command += ["--systems", ",".join(names), "--steps", str(steps), "--minutes", str(minutes)]
                with EmulatedNetwork(hosts=ranks, rate=rate) as network:
                    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
                    result = network.run(
                        command, environment=environment, timeout_seconds=_TIMEOUT_SECONDS, quiet=True
                    )
                if result.exit_code != 0:
                    print("\n".join(result.output), file=sys.stderr)
                    raise typer.Exit(result.exit_code)
                line = next(one for one in result.output[0].splitlines() if one.startswith(_LINE))
                cell = Cell.from_json(line.removeprefix(_LINE))
                rows = rows_of(case, cell)
                for row in rows:
                    file.add(row)
                _print(rows, cell)


def _installed(names: list[str]) -> list[str]:
    known = set(SYSTEMS)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(SYSTEMS)}")
    if hivemind_hook.NAME in names and (why := hivemind_hook.missing()):
        print(f"left out: {why}", file=sys.stderr)
        names = [name for name in names if name != hivemind_hook.NAME]
    return [NATIVE, *(name for name in names if name != NATIVE)]


def _print(rows: list[Row], cell: Cell) -> None:
    table = Table(
        title=rows[0].case, caption=f"auto: {cell.systems[AUTO].reason}" if AUTO in cell.systems else ""
    )
    columns = {
        "step_seconds": ("ms/step", ".0f", 1000.0),
        "exposed_seconds": ("exposed ms", ".0f", 1000.0),
        "exposed_shorter": ("shorter", ".1f", 1.0),
        "step_over_native": ("step / native", ".3f", 1.0),
        "step_over_native_upper95": ("≤", ".3f", 1.0),
        "step_over_best_fixed": ("/ best", ".3f", 1.0),
        "nic_bytes_per_step": ("sent MB", ".2f", 1e-6),
        "predicted_over_measured": ("predicted", ".2f", 1.0),
    }
    table.add_column("system")
    for title, _, _ in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for system in dict.fromkeys(row.system for row in rows):
        found = {row.metric: row.value for row in rows if row.system == system}
        cells = [
            format(found[metric] * scale, form) if metric in found else ""
            for metric, (_, form, scale) in columns.items()
        ]
        table.add_row(system, *cells)
    Console(width=max(110, Console().width)).print(table)


if __name__ == "__main__":
    typer.run(main)
