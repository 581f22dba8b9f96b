"""What does an attached entropy observer cost, as a share of training steps?

python -m benchmarks.entropy --out benchmarks/results/entropy.jsonl     # minutes on one core
python -m benchmarks.entropy --quick                                    # a smaller model, under a minute
Seconds are the process's CPU time on one thread, so that other processes on the machine do not count.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row, RowFile
from efficient_dl.config import Config, DataConfig, ModelConfig
from efficient_dl.data import load_data
from efficient_dl.entropy import KINDS, EntropyObserver
from efficient_dl.models import build_model, count_parameters
from efficient_dl.training.run_folder import RunFolder

BENCH = "entropy_observer"
CASES = {
    "gpt-nano": (ModelConfig(name="gpt", size="nano", context=128), DataConfig(name="stdlib", batch_size=8)),
    "gpt-micro": (
        ModelConfig(name="gpt", size="micro", context=128),
        DataConfig(name="stdlib", batch_size=8),
    ),
    "resnet18-micro": (
        ModelConfig(name="resnet18", size="micro"),
        DataConfig(name="fashion-mnist", batch_size=64),
    ),
}


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    case: Annotated[str, typer.Option(help="of the cases, with commas; empty: all")] = "",
    repeats: Annotated[int, typer.Option(help="measurements, and plain steps to compare", min=3)] = 9,
    quick: Annotated[bool, typer.Option(help="the smallest case, 3 repeats")] = False,
) -> None:
    """Plain and measured steps in turn; at the default interval the share is (measured − plain) / every / plain."""
    torch.set_num_threads(1)
    file = RowFile(out)
    names = ["gpt-nano"] if quick else [one for one in case.split(",") if one] or list(CASES)
    for name in names:
        measure(name, 3 if quick else repeats, file)
    for row in file.rows:
        print(f"{row.case:16} {row.system:12} {row.metric:28} {row.value:10.4f} {row.unit}")


def measure(name: str, repeats: int, file: RowFile) -> None:
    config, data_config = CASES[name]
    data = load_data(data_config, context=config.context, seed=0)
    model = build_model(config, data.spec, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = [data.train_batch(step, 0, 1, data_config.batch_size, 1, 0) for step in range(4)]
    for inputs, targets in batches:
        step_seconds(model, optimizer, inputs, targets)  # warm-up
    every = EntropyObserver(model, kinds=[]).every
    plain: list[float] = []
    for kinds in ([one] for one in KINDS):
        seconds(name, "+".join(kinds), model, optimizer, batches, kinds, repeats, every, file)
    plain = seconds(name, "all", model, optimizer, batches, list(KINDS), repeats, every, file)
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.closing(RunFolder(Path(out), writes=True)) as folder,
    ):
        folder.open(Config(), 0)
        recorded = "all, recorded by edl train"
        seconds(name, recorded, model, optimizer, batches, list(KINDS), repeats, every, file, folder)
    file.add(Row(BENCH, name, "none", "step_seconds", statistics.median(plain), "s of CPU", False))
    file.add(Row(BENCH, name, "none", "parameters", float(count_parameters(model)), "", False))


def seconds(
    name: str,
    system: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    kinds: list[str],
    repeats: int,
    every: int,
    file: RowFile,
    folder: RunFolder | None = None,
) -> list[float]:
    """Adds the rows of one choice of kinds; returns the plain steps' seconds. folder: where rows are recorded, too."""
    plain: list[float] = []
    measured: list[float] = []
    waiting: list[float] = []
    for repeat in range(repeats):
        inputs, targets = batches[repeat % len(batches)]
        plain.append(step_seconds(model, optimizer, inputs, targets))
        with EntropyObserver(model, optimizer, every=every, kinds=kinds, writer=folder) as observer:
            measured.append(step_seconds(model, optimizer, inputs, targets))  # the first step is measured
            if folder is not None:
                began = time.process_time()
                folder.log_entropy([asdict(row) for row in observer.rows])
                measured[-1] += time.process_time() - began
            waiting.append(step_seconds(model, optimizer, inputs, targets))  # the second is not
    base = statistics.median(plain)
    cost = statistics.median(measured) - base
    idle = statistics.median(w - p for w, p in zip(waiting, plain, strict=True))
    share = cost / every / base
    for metric, value, unit in (
        ("measurement_seconds", cost, "s of CPU"),
        ("share_of_step_at_default", 100 * share, f"% (every {every} steps)"),
        ("share_between_measurements", 100 * idle / base, "%, within the noise of steps"),
    ):
        file.add(Row(BENCH, name, system, metric, value, unit, False))
    return plain


def step_seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> float:
    """One training step; its seconds of CPU."""
    begin = time.process_time()
    loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - begin


if __name__ == "__main__":
    typer.run(main)
