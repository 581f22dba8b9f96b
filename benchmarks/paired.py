"""Does compression change what a model learns? Paired runs: the same initialization and data, with and without.

python -m benchmarks.paired --out benchmarks/results/paired.jsonl            # 5 seeds, some 40 minutes on 2 cores
python -m benchmarks.paired --quick                                          # one minute
python -m cluster.emulate --hosts 2 --rate 1gbit -- python -m benchmarks.paired --network "1 Gbit/s" --seeds 1
Runs whose rows are in --out already are not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers import PEERS, SystemTrainer
from benchmarks.rows import Row, RowFile
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.training import Worker, launch
from efficient_dl.training.console import progress_for

BENCH = "paired"
REFERENCE = "none"


@dataclass(frozen=True)
class Outcome:
    """One run: its loss on held-out data and what its steps cost."""

    val_loss: float
    wire_bytes_per_step: float
    kernel_bytes_per_step: float
    bits_per_value: float
    step_seconds: float


def train_all(worker: Worker, config: Config, case: str, runs: list[tuple[str, int]], path: Path) -> None:
    """Runs each (system, seed) in these workers, one after the other, appending rows as they finish."""
    device = worker.start(config.run)
    file = RowFile(path if worker.rank == 0 else None)
    for system, seed in runs:
        with tempfile.TemporaryDirectory() as folder:
            here = with_overrides(config, [f"train.seed={seed}", f"run.out={folder}/run{worker.rank}"])
            bits = "none" if system in PEERS else _bits(system)
            here = replace(here, compression=replace(here.compression, bits=bits))
            out = [here.run.out]
            dist.broadcast_object_list(out)
            here = replace(here, run=replace(here.run, out=out[0], workers=worker.size))
            data = load_data(here.data, context=here.model.context, seed=seed)
            progress = progress_for(worker.rank)
            progress.note(f"{system}, seed {seed}")
            trainer = SystemTrainer(here, data, device, progress, system)
            try:
                summary = trainer.train(resumed=False)
            finally:
                progress.stop()
            dist.barrier()  # nobody removes the folder while another rank is still in it
        counted: list[int] = [0] * worker.size
        dist.all_gather_object(counted, trainer.kernel_bytes)
        peer = system in PEERS
        outcome = Outcome(
            summary.val_loss,
            math.nan if peer else summary.wire_bytes_per_step,
            sum(counted) / summary.steps,
            math.nan if peer else summary.bits_per_value,
            summary.step_seconds_median,
        )
        for row in _rows(case, system, seed, outcome):
            file.add(row)


def case_of(config: Config, workers: int) -> str:
    """What stays the same over systems and seeds."""
    train = config.train
    model = f"{config.model.name}-{config.model.size} on {config.data.name}"
    batch = f"{workers} workers x {config.data.batch_size * train.accumulate}"
    return f"{model}, {batch}, {train.steps} steps, {config.optimizer.name} lr {config.optimizer.lr:g}"


def relative_differences(losses: list[float], reference: list[float]) -> tuple[float, float]:
    """Mean relative difference of paired losses and the half-width of its 95 % interval (Student's t), as fractions."""
    from scipy.stats import t

    differences = [(a - b) / b for a, b in zip(losses, reference, strict=True)]
    if len(differences) < 2:
        return differences[0], math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(t.ppf(0.975, len(differences) - 1)) * error


def _bits(system: str) -> str | float:
    return system if system in ("none", "identity", "lossless") else float(system)


def _rows(case: str, system: str, seed: int, outcome: Outcome) -> list[Row]:
    values = [
        ("val_loss", outcome.val_loss, "nats", False),
        ("wire_bytes_per_step", outcome.wire_bytes_per_step, "bytes, all ranks", False),
        ("kernel_bytes_per_step", outcome.kernel_bytes_per_step, "bytes, all ranks, by the kernel", False),
        ("bits_per_value", outcome.bits_per_value, "bits", False),
        ("step_seconds", outcome.step_seconds, "s", False),
    ]
    return [
        Row(BENCH, f"{case}, seed {seed}", system, metric, value, unit, better)
        for metric, value, unit, better in values
        if not math.isnan(value)
    ]


def _measured(path: Path | None) -> dict[tuple[str, str, str], float]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["case"], r["system"], r["metric"]): r["value"] for r in rows if r["bench"] == BENCH}


def _report(
    case: str, systems: list[str], seeds: int, measured: dict[tuple[str, str, str], float]
) -> list[Row]:
    def values(system: str, metric: str) -> list[float]:
        keys = [(f"{case}, seed {seed}", system, metric) for seed in range(seeds)]
        return [measured.get(key, math.nan) for key in keys if (*key[:2], "val_loss") in measured]

    table = Table(title=case)
    for name in (
        "system",
        "seeds",
        "val loss",
        "difference",
        "95 % interval",
        "MB/step sent",
        "bits/value",
        "ms/step",
    ):
        table.add_column(name, justify="right")
    rows: list[Row] = []
    for system in systems:
        losses = values(system, "val_loss")
        mean, half = relative_differences(losses, values(REFERENCE, "val_loss")[: len(losses)])
        rows += [
            Row(BENCH, f"{case}, {len(losses)} pairs", system, metric, value, "fraction", False)
            for metric, value in (
                ("relative_loss_difference", mean),
                ("relative_loss_difference_upper95", mean + half),
            )
            if system != REFERENCE and not math.isnan(value)
        ]
        sent = statistics.mean(values(system, "kernel_bytes_per_step")) / 1e6
        table.add_row(
            system,
            str(len(losses)),
            f"{statistics.mean(losses):.4f}",
            f"{100 * mean:+.2f} %",
            f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f} %",
            f"{sent:.3f}",
            f"{statistics.mean(values(system, 'bits_per_value')):.3f}",
            f"{1000 * statistics.median(values(system, 'step_seconds')):.0f}",
        )
    Console().print(table)
    return rows


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    systems: Annotated[str, typer.Option(help="bits, or torch's hooks: " + ", ".join(PEERS))] = "2.0",
    seeds: Annotated[int, typer.Option(help="paired runs of each system", min=1)] = 5,
    workers: Annotated[int, typer.Option(help="workers, started here unless a launcher has", min=1)] = 2,
    network: Annotated[str, typer.Option(help="a name for the links, part of the rows' case")] = "",
    steps: Annotated[int, typer.Option(help="optimizer steps a run", min=1)] = 1500,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, as in edl train")
    ] = None,
    quick: Annotated[bool, typer.Option(help="a tiny model, 2 seeds, a minute")] = False,
) -> None:
    """Train the same model with and without compression, seed by seed, and compare the held-out losses."""
    if quick:
        seeds, steps = min(seeds, 2), min(steps, 40)
    overrides = [
        f"train.steps={steps}",
        f"train.eval_every={steps}",
        "train.eval_batches=64",
        "train.checkpoint_every=0",
        "train.log_every=100",
        *(["model.size=nano"] if quick else []),
        *(settings or []),
    ]
    config = with_overrides(Config(), overrides)
    case = case_of(config, workers) + (f", {network}" if network else "")
    names = [REFERENCE, *(name.strip() for name in systems.split(",") if name.strip() != REFERENCE)]
    have = _measured(out)
    todo = [
        (name, seed)
        for seed in range(seeds)
        for name in names
        if (f"{case}, seed {seed}", name, "val_loss") not in have
    ]
    path = out or Path(tempfile.mkdtemp()) / "rows.jsonl"
    if todo:
        launch(workers, train_all, config, case, todo, path)
    if os.environ.get("RANK", "0") != "0":
        return
    rows = _report(case, names, seeds, _measured(path))
    file = RowFile(out)
    for row in rows:
        file.add(row)


if __name__ == "__main__":
    typer.run(main)
