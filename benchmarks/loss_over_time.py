"""Who is first at a loss? One training a system on loopback, for the step times of benchmarks.communication.

python -m benchmarks.loss_over_time --model gpt-micro --out LOSSES.jsonl
python -m benchmarks.communication --models gpt-micro --hosts 2 --rates 100mbit,1gbit --out STEPS.jsonl
python -m benchmarks.plot_loss_over_time LOSSES.jsonl STEPS.jsonl PICTURE.svg
A system's losses do not depend on the link, and its seconds a step not on the loss: each is measured where it is cheap.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn import Module

from benchmarks import hivemind_hook
from benchmarks.communication_cell import AUTO, MODELS, NATIVE, SYSTEMS, Contestant
from benchmarks.rows import Row, RowFile
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import Dataset, load_data
from efficient_dl.training import Worker, launch
from efficient_dl.training.console import progress_for
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.task import task_for

BENCH = "loss_over_time"
TRAINED = tuple(name for name in SYSTEMS if name not in ("identity", AUTO))  # lossless has identity's bits
_EVAL_BATCHES = 16


def train_all(worker: Worker, model: str, systems: list[str], steps: int, every: int, seed: int) -> list[Row]:
    """One training of each system; the held-out loss after every so many steps."""
    config = with_overrides(Config(), [*MODELS[model], f"train.steps={steps}", f"run.workers={worker.size}"])
    worker.start(config.run)
    data = load_data(config.data, context=config.model.context, seed=seed)
    progress = progress_for(worker.rank)
    rows: list[Row] = []
    try:
        for system in systems:
            progress.note(system)
            contestant = Contestant(system, config, data)
            for step in range(steps):
                for group in contestant.optimizer.param_groups:
                    group["lr"] = learning_rate(config.optimizer, step, steps)
                batch = data.train_batch(
                    step + seed * steps, worker.rank, worker.size, config.data.batch_size
                )
                contestant.step(*batch)
                if (step + 1) % every == 0:
                    loss = _held_out_loss(contestant.ddp.module, config, data)
                    case = f"{model}, {worker.size} ranks, {steps} steps, seed {seed}, step {step + 1}"
                    rows.append(Row(BENCH, case, system, "val_loss", loss, "nats", False))
            contestant.close()
    finally:
        progress.stop()
    return rows


def run(
    model: str, systems: list[str], steps: int, every: int, seed: int, out: Path | None, worker: Worker
) -> None:
    """One rank; rank 0 writes the rows and prints the last losses."""
    rows = train_all(worker, model, systems, steps, every, seed)
    if worker.rank == 0:
        file = RowFile(out)
        for row in rows:
            file.add(row)
        for system, row in {row.system: row for row in rows}.items():
            typer.echo(f"{system:<14} {row.value:.4f} {row.unit}, {row.case}")


@torch.no_grad()
def _held_out_loss(model: Module, config: Config, data: Dataset) -> float:
    task = task_for(data.spec.kind)
    model.eval()
    batches = data.eval_batches(_EVAL_BATCHES, config.data.batch_size)
    losses = [float(task.loss(model(inputs), targets)) for inputs, targets in batches]
    model.train()
    return statistics.mean(losses)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    model: Annotated[str, typer.Option(help="one of " + ", ".join(MODELS))] = "gpt-micro",
    systems: Annotated[str, typer.Option(help="of " + ", ".join(TRAINED))] = ",".join(TRAINED),
    ranks: Annotated[int, typer.Option(help="workers on this machine", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="of each training", min=10)] = 300,
    every: Annotated[int, typer.Option(help="steps between measurements of the held-out loss", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="of the data's order")] = 0,
) -> None:
    """Trains the same model with each system and writes its held-out losses."""
    names = [name.strip() for name in systems.split(",")]
    if unknown := [name for name in names if name not in TRAINED]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(TRAINED)}")
    if model not in MODELS:
        raise typer.BadParameter(f"unknown: {model}; known: {', '.join(MODELS)}")
    if hivemind_hook.NAME in names and (why := hivemind_hook.missing()):
        typer.echo(f"left out: {why}", err=True)
        names.remove(hivemind_hook.NAME)
    names = [NATIVE, *(name for name in names if name != NATIVE)]

    launch(ranks, partial(run, model, names, steps, every, seed, out))


if __name__ == "__main__":
    typer.run(main)
