"""What does compression change in each engine? Losses and bytes of paired runs on DDP, FSDP2 and ZeRO-2.

python -m cluster.emulate --hosts 2 -- python -m benchmarks.integrations --out benchmarks/results/integrations.jsonl
python -m benchmarks.integrations --quick                         # without emulated hosts
Emulated hosts have interfaces of their own, whose counters nobody else's traffic disturbs. ZeRO's gathers of the new
weights are DeepSpeed's own: in the kernel's bytes, not in our meter's.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engines import ENGINES, NATIVE, Run, missing
from benchmarks.nic import sent_bytes
from benchmarks.pairs import paired_difference
from benchmarks.rows import Row, RowFile
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import Dataset, load_data
from efficient_dl.models import build_model
from efficient_dl.training import Worker, launch
from efficient_dl.training.console import Progress, progress_for
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.task import task_for

BENCH = "integrations"
OURS = ("identity", "lossless", "2.0")
CASES = {
    "GPT, AdamW": ["model.name=gpt", "model.size=micro", "data.name=stdlib", "data.batch_size=8"],
    "ResNet, SGD": [
        "model.name=resnet18", "model.size=mini", "data.name=fashion-mnist", "data.batch_size=32",
        "optimizer.name=sgd", "optimizer.lr=0.05", "optimizer.weight_decay=0.0005",
    ],
}  # fmt: skip
_EVAL_BATCHES = 32
_UNCOUNTED_STEPS = 12  # DDP's buckets settle, and PowerSGD starts in step 10


@dataclass(frozen=True)
class Outcome:
    """One run: the loss on held-out data, bytes of all ranks in a step, and a step's seconds."""

    val_loss: float
    nic_bytes_per_step: float
    wire_bytes_per_step: float
    step_seconds: float


def run_all(worker: Worker, cases: list[str], engines: list[str], seeds: int, steps: int) -> list[Row]:
    """Every case, engine, system and seed, one after the other; returns the rows."""
    device = worker.start(with_overrides(Config(), [f"run.workers={worker.size}"]).run)
    progress = progress_for(worker.rank)
    rows: list[Row] = []
    try:
        for case in cases:
            config = with_overrides(Config(), [*CASES[case], f"train.steps={steps}"])
            data = load_data(config.data, context=config.model.context, seed=0)
            for engine in engines:
                rows += _engine_rows(worker, device, progress, case, engine, config, data, seeds)
    finally:
        progress.stop()
    return rows


def _engine_rows(
    worker: Worker,
    device: torch.device,
    progress: Progress,
    case: str,
    engine: str,
    config: Config,
    data: Dataset,
    seeds: int,
) -> list[Row]:
    systems = [NATIVE, *OURS, *(("fp16 hook", "PowerSGD 4") if engine == "DDP" else ())]
    outcomes: dict[str, dict[int, Outcome]] = {system: {} for system in systems}
    for seed in range(seeds):
        for system in systems:
            progress.note(f"{case}, {engine}, {system}, seed {seed}")
            outcomes[system][seed] = _one(worker, device, engine, system, config, data, seed)
    where = f"{case}, {config.train.steps} steps, {worker.size} ranks"
    return [row for system in systems for row in _rows(where, f"{engine} {system}", outcomes, system, NATIVE)]


def _one(
    worker: Worker,
    device: torch.device,
    engine: str,
    system: str,
    config: Config,
    data: Dataset,
    seed: int,
) -> Outcome:
    steps, task = config.train.steps, task_for(data.spec.kind)
    model = build_model(config.model, data.spec, seed).to(device)
    run = ENGINES[engine](model, config.optimizer, system, seed)
    seconds: list[float] = []
    sent = 0
    for step in range(steps):
        if step == _UNCOUNTED_STEPS:
            dist.barrier()
            sent = sent_bytes(worker.rank)
        inputs, targets = data.train_batch(
            step + seed * steps, worker.rank, worker.size, config.data.batch_size
        )
        run.set_lr(learning_rate(config.optimizer, step, steps))
        begin = time.perf_counter()
        run.step(task.loss(run.forward(inputs.to(device)), targets.to(device)))
        seconds.append(time.perf_counter() - begin)
    dist.barrier()
    counted = torch.tensor([sent_bytes(worker.rank) - sent], dtype=torch.float64, device=device)
    dist.all_reduce(counted)
    wire = run.stats().get("wire_bytes_per_step", float("nan"))  # before validation gathers weights once more
    loss = _validation_loss(run, model, config, data, device)
    run.close()
    return Outcome(loss, float(counted) / max(steps - _UNCOUNTED_STEPS, 1), wire, statistics.median(seconds))


@torch.no_grad()
def _validation_loss(
    run: Run, model: torch.nn.Module, config: Config, data: Dataset, device: torch.device
) -> float:
    """The mean over the same batches on every rank, which all take part in: sharded models gather their weights."""
    task = task_for(data.spec.kind)
    model.eval()
    losses = [
        float(task.loss(run.forward(x.to(device)), y.to(device)))
        for x, y in data.eval_batches(_EVAL_BATCHES, config.data.batch_size)
    ]
    model.train()
    return statistics.mean(losses)


def _rows(
    case: str, name: str, outcomes: dict[str, dict[int, Outcome]], system: str, reference: str
) -> list[Row]:
    runs = outcomes[system]
    losses = {seed: outcome.val_loss for seed, outcome in runs.items()}
    native = {seed: outcome.val_loss for seed, outcome in outcomes[reference].items()}
    found = paired_difference(losses, native)
    nic = statistics.mean(outcome.nic_bytes_per_step for outcome in runs.values())
    native_nic = statistics.mean(outcome.nic_bytes_per_step for outcome in outcomes[reference].values())
    values: list[tuple[str, float, str, bool]] = [
        ("val_loss", statistics.mean(losses.values()), f"nats, mean of {len(losses)} seeds", False),
        ("nic_bytes_per_step", nic, "bytes, all ranks, by the kernel", False),
        ("nic_ratio", native_nic / nic if nic else float("nan"), "native's bytes / these", True),
        ("step_seconds", statistics.median(o.step_seconds for o in runs.values()), "s", False),
    ]
    if system != reference:
        values.append(("loss_difference", found.mean, f"fraction, {found.num_pairs} pairs", False))
        values.append(("loss_difference_half_width", found.half_width, "fraction, 95 %", False))
    if system in OURS:
        wire = statistics.mean(outcome.wire_bytes_per_step for outcome in runs.values())
        values.append(("wire_bytes_per_step", wire, "bytes, all ranks, by our meter", False))
    return [Row(BENCH, case, name, metric, value, unit, better) for metric, value, unit, better in values]


def _print(rows: list[Row]) -> None:
    for case in dict.fromkeys(row.case for row in rows):
        table = Table(
            title=case, caption="sent: by the kernel, all ranks; difference to native, paired by seed"
        )
        for name in (
            "system",
            "val loss",
            "difference",
            "± 95 %",
            "sent MB/step",
            "meter MB/step",
            "ratio",
            "ms/step",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        for system in dict.fromkeys(row.system for row in rows if row.case == case):
            found = {row.metric: row.value for row in rows if (row.case, row.system) == (case, system)}

            def cell(metric: str, form: str, scale: float = 1.0, found: dict[str, float] = found) -> str:
                return format(found[metric] * scale, form) if metric in found else ""

            table.add_row(
                system,
                cell("val_loss", ".4f"),
                cell("loss_difference", "+.2f", 100),
                cell("loss_difference_half_width", ".2f", 100),
                cell("nic_bytes_per_step", ".3f", 1e-6),
                cell("wire_bytes_per_step", ".3f", 1e-6),
                cell("nic_ratio", ".2f"),
                cell("step_seconds", ".0f", 1000),
            )
        Console(width=max(110, Console().width)).print(table)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    engines: Annotated[str, typer.Option(help="of " + ", ".join(ENGINES))] = ",".join(ENGINES),
    cases: Annotated[str, typer.Option(help="semicolons between; of " + "; ".join(CASES))] = ";".join(CASES),
    seeds: Annotated[int, typer.Option(help="paired runs of each system", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="optimizer steps a run", min=20)] = 200,
    workers: Annotated[int, typer.Option(help="workers, started here unless a launcher has", min=2)] = 2,
    quick: Annotated[bool, typer.Option(help="one seed, 30 steps, the GPT alone")] = False,
) -> None:
    """Train the same models natively and compressed on every engine; compare losses and bytes, beside torch's hooks."""
    chosen = [name.strip() for name in engines.split(",")]
    named = [name.strip() for name in cases.split(";")]
    unknown = [name for name in chosen if name not in ENGINES] + [name for name in named if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}")
    lacking = [f"{name}: {why}" for name in chosen if (why := missing(name)) is not None]
    if lacking:
        raise typer.BadParameter(
            "; ".join(lacking) + f"; or --engines {','.join(n for n in chosen if not missing(n))}"
        )
    if quick:
        named, seeds, steps = named[:1], 1, 30
    rows = launch(workers, run_all, named, chosen, seeds, steps)
    if os.environ.get("RANK", "0") != "0":
        return
    file = RowFile(out)
    for row in rows:
        file.add(row)
    _print(rows)


if __name__ == "__main__":
    typer.run(main)
