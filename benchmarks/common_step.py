"""What does one step size for all packets save, against a step for each packet? Squared errors at equal bytes.

python -m benchmarks.common_step --out benchmarks/results/common_step.jsonl
Trains a ResNet by SGD in one process, uncompressed, on the batches of two workers, and averages every step's gradients
both ways beside it: the same gradients, buckets and rates, no error feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import Row, RowFile
from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    LoopbackHub,
    Plan,
    Transport,
    all_reduce,
    combined,
    since,
    summary,
)
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.models import build_model
from efficient_dl.training.task import task_for

BENCH = "common_step"
WORKERS = 2
WAYS = {"a step for each packet": False, "one step for all packets": True}
Gradients = dict[str, Tensor]


def buckets_of(numels: dict[str, int], bucket_bytes: int) -> list[list[str]]:
    """Names in the order in which backward computes them, in buckets of about so many bytes."""
    buckets: list[list[str]] = [[]]
    for name in reversed(numels):
        if buckets[-1] and 4 * sum(numels[one] for one in buckets[-1]) >= bucket_bytes:
            buckets.append([])
        buckets[-1].append(name)
    return buckets


class Averager:
    """Averages the workers' gradients by one way, on in-memory ranks, and adds up the squared errors."""

    def __init__(self, bits: float, common: bool, numels: dict[str, int], buckets: list[list[str]]) -> None:
        self._common, self._numels, self._buckets = common, numels, buckets
        self._compressors = [Compressor(Plan.of(bits, scale="global"), list(numels)) for _ in range(WORKERS)]
        hub = LoopbackHub(WORKERS, timeout=300.0)
        self._transports = [hub.transport(rank) for rank in range(WORKERS)]
        self._before = self._state()
        self._error = self._signal = 0.0

    def step(self, gradients: Sequence[Gradients]) -> None:
        """One training step."""
        with ThreadPoolExecutor(WORKERS) as threads:
            jobs = zip(self._transports, self._compressors, gradients, strict=True)
            results = list(threads.map(lambda job: self._rank(*job), jobs))
        for name in self._numels:
            exact = sum(one[name].double() for one in gradients) / WORKERS
            assert isinstance(exact, Tensor)
            self._error += float((results[0][name].double() - exact).square().sum())
            self._signal += float(exact.square().sum())

    def settled(self) -> None:
        """Counts from here on."""
        self._before = self._state()
        self._error = self._signal = 0.0

    def found(self) -> dict[str, float]:
        """Relative squared error, bits a value, and the least and most bits of a parameter, over all ranks."""
        stats = summary(since(self._state(), self._before))
        sent = [row["order0_bits"] for row in stats["parameters"].values() if row["entropy_sampled"]]
        return {
            "squared_error": self._error / self._signal,
            "bits_per_value": stats["bits_per_value"],
            "least_order0_bits": min(sent),
            "most_order0_bits": max(sent),
        }

    def _state(self) -> dict[str, Any]:
        return combined([one.meter.state_dict() for one in self._compressors])

    def _rank(self, transport: Transport, compressor: Compressor, gradients: Gradients) -> Gradients:
        compressor.begin_step()
        results: Gradients = {}
        for names in self._buckets:
            numels = [self._numels[name] for name in names]
            x = torch.cat([gradients[name].flatten() for name in names])
            all_reduce(x, BucketLayout.of(names, numels, WORKERS), compressor, transport)
            results |= {n: part.view_as(gradients[n]) for n, part in zip(names, x.split(numels), strict=True)}
        compressor.end_step(0.0)
        if self._common:
            compressor.agree(transport)
        return results


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    size: Annotated[str, typer.Option(help="the ResNet's size")] = "mini",
    steps: Annotated[int, typer.Option(help="training steps; the first 20 are not counted", min=22)] = 62,
    quick: Annotated[bool, typer.Option(help="a tiny model, seconds")] = False,
) -> None:
    """Average a ResNet's gradients with a step for each packet and with one for all; compare errors and bytes."""
    if quick:
        size, steps = "nano", 22
    config = with_overrides(
        Config(),
        ["model.name=resnet18", f"model.size={size}", "data.name=fashion-mnist", "data.batch_size=32"],
    )
    data = load_data(config.data, context=1, seed=0)
    model, task = build_model(config.model, data.spec, 0), task_for(data.spec.kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    numels = {name: p.numel() for name, p in model.named_parameters()}
    buckets = buckets_of(numels, 2**18)
    averagers = {
        (bits, way): Averager(bits, common, numels, buckets)
        for bits in (0.5, 1.0, 2.0)
        for way, common in WAYS.items()
    }
    for step in range(steps):
        if step == 20:
            for averager in averagers.values():
                averager.settled()
        everyone: list[Gradients] = []
        for worker in range(WORKERS):
            model.zero_grad()
            inputs, targets = data.train_batch(step, worker, WORKERS, config.data.batch_size)
            task.loss(model(inputs), targets).backward()
            everyone.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        for averager in averagers.values():
            averager.step(everyone)
        for name, parameter in model.named_parameters():
            parameter.grad = (everyone[0][name] + everyone[1][name]) / WORKERS
        optimizer.step()
    file = RowFile(out)
    table = Table(title=f"resnet18-{size}, {sum(numels.values()):,} values in {len(buckets)} buckets")
    for column in ("asked", "way", "bits/value", "squared error", "bits of a parameter"):
        table.add_column(column, justify="right")
    for (bits, way), averager in averagers.items():
        found = averager.found()
        for metric, value in found.items():
            unit = "fraction of the mean gradient's" if metric == "squared_error" else "bits"
            case = f"resnet18-{size}, SGD, {WORKERS} workers, steps 21 to {steps}, {bits} bits"
            file.add(Row(BENCH, case, way, metric, value, unit, False))
        span = f"{found['least_order0_bits']:.2f} to {found['most_order0_bits']:.2f}"
        table.add_row(str(bits), way, f"{found['bits_per_value']:.3f}", f"{found['squared_error']:.4f}", span)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
