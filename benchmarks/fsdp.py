"""What FSDP2 sends and learns with and without compression: paired runs of the embedded GPT, every block sharded.

python -m benchmarks.fsdp --out benchmarks/results/fsdp.jsonl
python -m cluster.emulate --hosts 2 --rate 1gbit -- python -m benchmarks.fsdp     # bytes by the kernel's counters, too
python -m benchmarks.fsdp --quick                                                 # one minute
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import fully_shard

import efficient_dl as edl
from benchmarks.nic import sent_bytes
from benchmarks.rows import Row, RowFile
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.models import build_model
from efficient_dl.training import Worker, launch

BENCH = "fsdp"
SYSTEMS = {"none": ("none", "none"), "lossless": ("lossless", "lossless"), "2.0": (2.0, "lossless")}
BATCH = 8


def compare(worker: Worker, config: Config, steps: int, seeds: int) -> dict[str, dict[str, float]]:
    """Trains every system in these workers, one after the other; returns its numbers."""
    worker.start(config.run)
    return {
        f"{name}, seed {seed}": _train(worker, config, steps, seed, *options)
        for seed in range(seeds)
        for name, options in SYSTEMS.items()
    }


def _train(
    worker: Worker, config: Config, steps: int, seed: int, bits: str | float, weights: str
) -> dict[str, float]:
    data = load_data(config.data, context=config.model.context, seed=seed)
    model = build_model(config.model, data.spec, seed=seed)
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    compression = edl.compress(model, optimizer, bits, weights=weights, check_every=0)
    seconds: list[float] = []
    before = sent_bytes(worker.rank)
    for step in range(steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        x, y = data.train_batch(step, worker.rank, worker.size, BATCH)
        optimizer.zero_grad()
        _loss(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    kernel_bytes = torch.tensor(float(sent_bytes(worker.rank) - before))
    dist.all_reduce(kernel_bytes)
    stats = compression.stats(all_ranks=True)
    with torch.no_grad():
        losses = [float(_loss(model, x, y)) for x, y in data.eval_batches(32, BATCH)]
    compression.close()
    return {
        "val_loss": statistics.mean(losses),
        "wire_bytes_per_step": stats["wire_bytes_per_step"],
        "gradient_bytes_per_step": stats["gradients"]["wire_bytes_per_step"],
        "weight_bytes_per_step": stats["weights"]["wire_bytes_per_step"],
        "gradient_bits_per_value": stats["gradients"]["bits_per_value"],
        "weight_bits_per_value": stats["weights"]["bits_per_value"],
        "kernel_bytes_per_step": float(kernel_bytes) / steps,
        "step_seconds": statistics.median(seconds),
    }


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    workers: Annotated[int, typer.Option(help="workers, started here unless a launcher has", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="optimizer steps a run", min=1)] = 150,
    seeds: Annotated[int, typer.Option(help="runs of each system", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="30 steps")] = False,
) -> None:
    """Train the same model natively, losslessly and at 2 bits, and compare bytes and held-out losses."""
    config = with_overrides(Config(), ["model.size=nano"])
    steps = min(steps, 30) if quick else steps
    found = launch(workers, compare, config, steps, seeds)
    if os.environ.get("RANK", "0") != "0":
        return
    world_size = int(os.environ.get("WORLD_SIZE", workers))
    table = Table(title=f"FSDP2, gpt-nano, {world_size} workers, {steps} steps; all ranks")
    for name in ("system", "val loss", "MB/step", "gradients", "weights", "kernel", "ms/step"):
        table.add_column(name, justify="right")
    file = RowFile(out)
    for system, values in found.items():
        case = f"gpt-nano on stdlib, {world_size} workers x {BATCH}, {steps} steps"
        for metric, value in values.items():
            file.add(Row(BENCH, case, system, metric, value, _UNITS.get(metric, "bytes, all ranks"), False))
        table.add_row(
            system,
            f"{values['val_loss']:.4f}",
            f"{values['wire_bytes_per_step'] / 1e6:.3f}",
            f"{values['gradient_bits_per_value']:.2f} bits",
            f"{values['weight_bits_per_value']:.2f} bits",
            f"{values['kernel_bytes_per_step'] / 1e6:.3f}",
            f"{1000 * values['step_seconds']:.0f}",
        )
    Console(width=100).print(table)


_UNITS = {
    "val_loss": "nats",
    "gradient_bits_per_value": "bits",
    "weight_bits_per_value": "bits",
    "step_seconds": "s",
}

if __name__ == "__main__":
    typer.run(main)
