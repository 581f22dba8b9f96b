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

import torch
import torch.distributed as dist
import typer
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import paired_difference
from benchmarks.peers import PEERS, SystemTrainer
from benchmarks.rows import Row, RowFile
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.errors import ConfigError
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
    weights_hash: float


def train_all(worker: Worker, config: Config, case: str, runs: list[tuple[str, int]], path: Path) -> None:
    """Runs each (system, seed) in these workers, one after the other, appending rows as they finish."""
    device = worker.start(config.run)
    file = RowFile(path if worker.rank == 0 else None)
    for system, seed in runs:
        with tempfile.TemporaryDirectory() as folder:
            here = with_overrides(config, [f"train.seed={seed}", f"run.out={folder}/run{worker.rank}"])
            here = with_overrides(here, _compression("none" if system in PEERS else system))
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
        outcome = Outcome(
            summary.val_loss,
            summary.wire_bytes_per_step,
            sum(counted) / summary.steps,
            summary.bits_per_value,
            summary.step_seconds_median,
            float(_hash(trainer.model)),
        )
        for row in _rows(case, system, seed, outcome):
            file.add(row)


def case_of(config: Config, workers: int, network: str) -> str:
    """What stays the same over systems and seeds; the digits at its end are a hash of every setting and the data."""
    train = config.train
    model = f"{config.model.name}-{config.model.size} on {config.data.name}"
    batch = f"{workers} workers x {config.data.batch_size * train.accumulate}"
    rule = f"{config.optimizer.name} lr {config.optimizer.lr:g}"
    link = f", {network}" if network else ""
    same = config.fingerprint(ignore=("run", "compression", "train.seed"))
    return f"{model}, {batch}, {train.steps} steps, {rule}{link} [{same[:8]}]"


def _hash(model: torch.nn.Module) -> int:
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.intdigest() & 0xFFFFFFFFFFFF  # a float64 holds it exactly


def _compression(system: str) -> list[str]:
    """The settings that "BITS" or "BITS SCALE" stand for."""
    bits, _, scale = system.partition(" ")
    return [f"compression.bits={bits}", *([f"compression.scale={scale}"] if scale else [])]


def _names(systems: str) -> list[str]:
    names = [REFERENCE, *(name.strip() for name in systems.split(",") if name.strip() != REFERENCE)]
    for name in names:
        if name in PEERS:
            continue
        try:
            with_overrides(Config(), _compression(name))
        except ConfigError as error:
            known = ", ".join(PEERS)
            raise typer.BadParameter(
                f"{name!r} is neither bits, with a scale or without, nor one of {known}"
            ) from error
    return names


def _rows(case: str, system: str, seed: int, outcome: Outcome) -> list[Row]:
    counted = "bytes, all ranks" + (", computed" if system == REFERENCE else "")
    values = [
        ("val_loss", outcome.val_loss, "nats"),
        ("kernel_bytes_per_step", outcome.kernel_bytes_per_step, "bytes, all ranks, by the kernel"),
        ("step_seconds", outcome.step_seconds, "s"),
        ("weights_hash", outcome.weights_hash, "low 48 bits of xxh3 over the final weights: equal or not"),
    ]
    if system not in PEERS:
        values.append(("wire_bytes_per_step", outcome.wire_bytes_per_step, counted))
        values.append(("bits_per_value", outcome.bits_per_value, "bits"))
    return [
        Row(BENCH, f"{case}, seed {seed}", system, name, value, unit, False) for name, value, unit in values
    ]


def _measured(path: Path | None) -> dict[tuple[str, str, str], float]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (r["case"], r["system"], r["metric"]): math.nan if r["value"] is None else r["value"]
        for r in rows
        if r["bench"] == BENCH
    }


def _report(
    case: str, systems: list[str], seeds: int, measured: dict[tuple[str, str, str], float]
) -> tuple[list[Row], list[str]]:
    """Prints the table; returns the rows of differences, and a line for each run that failed."""

    def values(system: str, metric: str) -> dict[int, float]:
        return {
            seed: measured[key]
            for seed in range(seeds)
            if (key := (f"{case}, seed {seed}", system, metric)) in measured
        }

    table = Table(title=case, caption="sent: by the kernel, all ranks; difference: relative, 95 % interval")
    for name in ("system", "pairs", "val loss", "difference", "interval", "MB/step", "bits/value", "ms/step"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[Row] = []
    failures: list[str] = []
    reference = values(REFERENCE, "val_loss")
    for system in systems:
        losses = values(system, "val_loss")
        found = paired_difference(losses, reference)
        failures += [
            f"{system}, seed {seed}: no finite loss, here or without compression" for seed in found.failed
        ]
        if system != REFERENCE:
            pairs = f"{case}, {found.num_pairs} pairs"
            rows.append(Row(BENCH, pairs, system, "loss_difference", found.mean, "fraction", False))
            rows.append(
                Row(BENCH, pairs, system, "loss_difference_upper95", found.upper95, "fraction", False)
            )
        bits = values(system, "bits_per_value")
        interval = f"{100 * (found.mean - found.half_width):+.2f} to {100 * found.upper95:+.2f} %"
        table.add_row(
            system,
            str(found.num_pairs),
            f"{statistics.mean(losses.values()):.4f}",
            "" if system == REFERENCE else f"{100 * found.mean:+.2f} %",
            "" if system == REFERENCE or found.num_pairs < 2 else interval,
            f"{statistics.mean(values(system, 'kernel_bytes_per_step').values()) / 1e6:.3f}",
            f"{statistics.mean(bits.values()):.3f}" if bits else "",
            f"{1000 * statistics.median(values(system, 'step_seconds').values()):.0f}",
        )
    Console(width=max(100, Console().width)).print(table)
    return rows, failures


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    systems: Annotated[
        str, typer.Option(help="bits, as '2.0' or '2.0 second_moment', or torch's hooks: " + ", ".join(PEERS))
    ] = "2.0",
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
    names = _names(systems)
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
    # The data's hash becomes a setting: a run on other data is refused, and so are rows of one.
    data = load_data(config.data, context=config.model.context, seed=config.train.seed)
    config = replace(config, data=replace(config.data, fingerprint=data.fingerprint))
    case = case_of(config, int(os.environ.get("WORLD_SIZE", workers)), network)
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
    measured = _measured(path)
    rows, failures = _report(case, names, seeds, measured)
    file = RowFile(out)
    for row in rows:
        if (row.case, row.system, row.metric) not in measured:
            file.add(row)
    for failure in failures:
        print(failure)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
