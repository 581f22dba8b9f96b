"""Does the entropy of weights fall in training, and does that make exchanging weights cheap?

python -m benchmarks.weight_exchange --out benchmarks/results/weight_exchange.jsonl     # half an hour on one core
python -m benchmarks.weight_exchange --quick                                            # half a minute
Two workers train copies of a network on halves of each batch and average their weights every few steps. What a worker
sends is a real packet, whose bytes count, headers included; both workers live in this process. The sent bits follow
the RMS of what is sent, after Øland & Raj (ICASSP 2015): per tensor d = W − W_ref, b = clip(first +
round(log2(rms(d)/rms_0)), 2, 8) with rms_0 that of the first exchange, stochastic rounding to a step of
range(d)/(2^b − 1), entropy coding, and W_ref += the mean of what was sent. first: 8, and 5 as a variant of ours.
"weights" sends W in the place of d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row, RowFile, as_dict
from benchmarks.verdicts import Rows, by_seed, differences, interval_text, says, span
from efficient_dl.codec import Side, make_codec
from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset, load_data
from efficient_dl.entropy import (
    RULES,
    exponent_entropy,
    frozen_entropy,
    range_entropy,
    rms_entropy,
)
from efficient_dl.models import build_model

BENCH = "weight_exchange"
EXACT = "fp32"
FIRST_BITS = {"differences, 8 bits first": 8, "differences, 5 bits first": 5, "weights, 8 bits first": 8}
SYSTEMS = (EXACT, *FIRST_BITS)
WORKERS = 2
MIN_BITS, MAX_BITS = 2, 8
TARGET_RATIO = 8.0
CURVE_POINTS = 8
MIN_NUMEL = 1024  # of tensors whose entropy is told
INITIALIZATIONS = {
    "normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.01),
}


@dataclass(frozen=True)
class Case:
    """batch: samples of a step, over both workers. period: steps between exchanges."""

    model: ModelConfig
    data: DataConfig
    steps: int
    period: int = 5
    eval_samples: int = 2000

    @property
    def title(self) -> str:
        return (
            f"{self.model.name}-{self.model.size} on {self.data.name}, {WORKERS} x {self.data.batch_size} a step, "
            f"{self.steps} steps, exchange every {self.period}"
        )


FULL = Case(
    ModelConfig(name="mlp", size="micro"), DataConfig(name="fashion-mnist", batch_size=32), steps=1000
)
QUICK = Case(ModelConfig(name="mlp", size="micro"), DataConfig(name="digits", batch_size=32), steps=160)


class Exchange:
    """What the workers agree on, and how they get there; `bytes` one worker sent on average, headers included."""

    def __init__(self, system: str, model: nn.Module, seed: int) -> None:
        self.system, self.count, self.bytes, self.raw_bytes = system, 0, 0.0, 0.0
        self.bits: list[int] = []
        self.reference = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._first_rms: dict[tuple[int, str], float] = {}
        self._random = torch.Generator().manual_seed(seed)
        self._codec = make_codec("grid:1.0")  # its rate does not matter: the step is given

    def __call__(self, workers: list[nn.Module]) -> None:
        """All workers have the same weights afterwards."""
        self.count += 1
        models = [dict(worker.named_parameters()) for worker in workers]
        with torch.no_grad():
            for name, reference in self.reference.items():
                mean = torch.zeros_like(reference)
                for worker, parameters in enumerate(models):
                    mean += self._sent(worker, name, parameters[name].detach(), reference) / len(workers)
                reference.copy_(mean)
                for parameters in models:
                    parameters[name].copy_(reference)

    def _sent(self, worker: int, name: str, weight: Tensor, reference: Tensor) -> Tensor:
        """The weight as it arrives."""
        self.raw_bytes += 4 * weight.numel() / WORKERS
        if self.system == EXACT:
            self.bytes += 4 * weight.numel() / WORKERS
            return weight
        base = reference if self.system.startswith("differences") else torch.zeros_like(reference)
        return base + self._quantized(worker, name, weight - base)

    def _quantized(self, worker: int, name: str, x: Tensor) -> Tensor:
        rms = float(x.square().mean().sqrt())
        first = self._first_rms.setdefault((worker, name), rms)
        octaves = round(math.log2(rms / first)) if rms > 0 and first > 0 else 0
        bits = min(MAX_BITS, max(MIN_BITS, FIRST_BITS[self.system] + octaves))
        self.bits.append(bits)
        step = float(x.max() - x.min()) / (2**bits - 1)
        if step < 2.0**-100:  # all values alike, such as zeros before the first gradient
            step = max(rms, 2.0**-100)
        noise = torch.rand(x.shape, generator=self._random)
        rounded = (x / step + noise).floor() * step
        side = Side(step_size=step)
        packet = self._codec.encode(rounded, side)
        self.bytes += packet.numel() / WORKERS
        decoded = torch.empty_like(x)
        self._codec.decode(packet, decoded, side=side)
        return decoded


@dataclass(frozen=True)
class Run:
    """Of one system: accuracy and loss on held-out data, bytes of one exchange, entropies by (rule, step)."""

    accuracy: float
    val_loss: float
    bytes_per_exchange: float
    raw_bytes_per_exchange: float
    mean_bits: float
    curve: dict[tuple[str, int], float]


def train(case: Case, data: Dataset, system: str, initialization: str, optimizer: str, seed: int) -> Run:
    """One run with a cosine of the learning rate; every system has the same initial values and batches."""
    workers = [built(case, data, initialization, seed) for _ in range(WORKERS)]
    optimizers = [OPTIMIZERS[optimizer](list(worker.parameters())) for worker in workers]
    peak = optimizers[0].param_groups[0]["lr"]
    exchange = Exchange(system, workers[0], seed)
    initial = {name: p.detach().clone() for name, p in workers[0].named_parameters()}
    curve = entropies(workers[0], initial, 0)
    marks = {round(case.steps * i / CURVE_POINTS) for i in range(1, CURVE_POINTS + 1)}
    for step in range(case.steps):
        for rank, (worker, descent) in enumerate(zip(workers, optimizers, strict=True)):
            for group in descent.param_groups:
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / case.steps))
            inputs, targets = data.train_batch(step, rank, WORKERS, case.data.batch_size)
            descent.zero_grad()
            F.cross_entropy(worker(inputs), targets).backward()
            descent.step()
        if (step + 1) % case.period == 0 or step + 1 == case.steps:
            exchange(workers)
        if step + 1 in marks:
            curve |= entropies(workers[0], initial, step + 1)
    accuracy, loss = held_out(workers[0], data, case.eval_samples)
    return Run(
        accuracy,
        loss,
        exchange.bytes / exchange.count,
        exchange.raw_bytes / exchange.count,
        sum(exchange.bits) / len(exchange.bits) if exchange.bits else 32.0,
        curve,
    )


def built(case: Case, data: Dataset, initialization: str, seed: int) -> nn.Module:
    model = build_model(case.model, data.spec, seed)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            INITIALIZATIONS[initialization](module.weight)
    return model


@torch.no_grad()
def entropies(model: nn.Module, initial: dict[str, Tensor], step: int) -> dict[tuple[str, int], float]:
    """Bits a value by (rule, step): means over the values of all tensors that are large enough."""
    sums: dict[str, float] = dict.fromkeys(RULES, 0.0)
    numel = 0
    for name, weight in model.named_parameters():
        if weight.numel() < MIN_NUMEL:
            continue
        found = {
            "range": range_entropy(weight),
            "frozen": frozen_entropy(weight, initial[name]),
            "rms": rms_entropy(weight),
            "exponent": exponent_entropy(weight),
        }
        numel += weight.numel()
        for rule, bits in found.items():
            sums[rule] += float(bits) * weight.numel()
    return {(rule, step): total / numel for rule, total in sums.items()}


@torch.no_grad()
def held_out(model: nn.Module, data: Dataset, samples: int) -> tuple[float, float]:
    ((inputs, targets),) = data.eval_batches(1, samples)
    logits = model(inputs)
    return float((logits.argmax(-1) == targets).float().mean()), float(F.cross_entropy(logits, targets))


def measure(case: Case, seeds: range, file: RowFile) -> None:
    """Every system, initialization and optimizer with every seed."""
    for seed in seeds:
        data = load_data(case.data, seed=seed)
        for initialization, optimizer in cells():
            where = f"{case.title}, {initialization} initialization, {optimizer}, seed {seed}"
            for system in SYSTEMS:
                run = train(case, data, system, initialization, optimizer, seed)
                ratio = run.raw_bytes_per_exchange / run.bytes_per_exchange
                for metric, value, unit, higher in (
                    ("accuracy", run.accuracy, "held out", True),
                    ("val_loss", run.val_loss, "nats", False),
                    ("bytes_per_exchange", run.bytes_per_exchange, "bytes a worker, packets", False),
                    ("ratio", ratio, "fp32 bytes / bytes", True),
                    ("bits", run.mean_bits, "b of the formula, a mean over tensors and exchanges", False),
                ):
                    file.add(Row(BENCH, where, system, metric, value, unit, higher))
                if system == EXACT:
                    for (rule, step), bits in run.curve.items():
                        file.add(
                            Row(
                                BENCH,
                                where,
                                system,
                                f"entropy_{rule}_at_{step}",
                                bits,
                                "bits a weight",
                                False,
                            )
                        )
                print(
                    f"{where}: {system}: accuracy {run.accuracy:.4f}, {ratio:.2f} x fewer bytes", flush=True
                )


def cells() -> Iterator[tuple[str, str]]:
    return ((one, other) for one in INITIALIZATIONS for other in OPTIMIZERS)


# ------------------------------------------------------------ the claim (T1)
def run_study(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the claim's study; threads are set to one."""
    torch.set_num_threads(1)
    file = RowFile(None)
    measure(QUICK if quick else FULL, range(2 if quick else 5), file)
    return [as_dict(row) for row in file.rows]


def verdict(rows: Rows) -> str:
    """Whether entropy falls under each rule (paired over seeds, 95 %), and what an exchange saves at what accuracy."""
    falling, changes = entropy_changes(rows)
    found: list[str] = []
    passing: dict[str, list[str]] = {}
    cells_seen: list[str] = []
    for system in FIRST_BITS:
        cells_seen, passing[system], text = exchange_cells(rows, system)
        found.append(f"{system}: {text}")
    ranges = ", ".join(f"{rule} {span(changes[rule], '+.2f')}" for rule in RULES if changes[rule])
    found.insert(1, f"entropy of weights from start to end, bits: {ranges}")
    entropy, exchange = _of_entropy(falling, cells_seen), _of_exchange(passing, cells_seen)
    conditions = None if entropy is None or exchange is None else [*entropy, *exchange]
    return says(conditions, "; ".join(found))


def _of_entropy(falling: dict[str, list[str]], everywhere: list[str]) -> list[str] | None:
    """Under which conditions entropy falls; None: under none."""
    rules = [rule for rule in RULES if everywhere and falling[rule] == everywhere]
    if len(rules) == len(RULES):
        return []
    if rules:
        return [f"weights are quantized by the rule {' or '.join(rules)}"]
    some = {rule: where for rule, where in falling.items() if where}
    if not some:
        return None
    rule = max(some, key=lambda one: len(some[one]))
    return [f"weights are quantized by the rule {rule}, with {' or '.join(some[rule])}"]


def _of_exchange(passing: dict[str, list[str]], everywhere: list[str]) -> list[str] | None:
    """Under which conditions the exchange is as cheap and as good as the claim says; None: under none."""
    for system, first in FIRST_BITS.items():
        if system.startswith("differences") and everywhere and passing[system] == everywhere:
            return [] if first == MAX_BITS else [f"differences begin with {first} bits"]
    best = max(passing, key=lambda one: len(passing[one]))
    return [f"{best} are sent, with {' or '.join(passing[best])}"] if passing[best] else None


def entropy_changes(rows: Rows) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """By rule: the cells in which entropy falls, sure to 95 %, and the mean change in every cell."""
    steps = curve_steps(rows)
    falling: dict[str, list[str]] = {rule: [] for rule in RULES}
    changes: dict[str, list[float]] = {rule: [] for rule in RULES}
    for rule in RULES:
        first, last = (by_seed(rows, EXACT, f"entropy_{rule}_at_{step}") for step in (steps[0], steps[-1]))
        for case in first:
            mean, half, _ = differences(last[case], first[case])
            changes[rule].append(mean)
            if mean + half < 0:
                falling[rule].append(cell_of(case))
    return falling, changes


def curve_steps(rows: Rows) -> list[int]:
    """The steps at which entropies were measured, ascending."""
    metrics = {str(row["metric"]) for row in rows}
    return sorted({int(one.rpartition("_at_")[2]) for one in metrics if one.startswith("entropy_")})


def exchange_cells(rows: Rows, system: str) -> tuple[list[str], list[str], str]:
    """All cells; those with the target's ratio and an accuracy surely within a deviation of fp32's seeds; a text."""
    ratios, accuracies = by_seed(rows, system, "ratio"), by_seed(rows, system, "accuracy")
    exact = by_seed(rows, EXACT, "accuracy")
    passing: list[str] = []
    means: list[float] = []
    changes: list[tuple[float, float]] = []
    for case, of_seed in ratios.items():
        mean_ratio = sum(of_seed.values()) / len(of_seed)
        means.append(mean_ratio)
        mean, half, _ = differences(accuracies[case], exact[case])
        changes.append((100 * mean, 100 * half))
        if mean_ratio >= TARGET_RATIO and mean - half >= -deviation(list(exact[case].values())):
            passing.append(cell_of(case))
    worst = min(changes, key=lambda c: c[0] - c[1] if math.isfinite(c[0]) else -math.inf, default=None)
    mean, half = worst or (math.nan, math.nan)
    text = (
        f"{span(means)} x fewer bytes than fp32, accuracy at worst {interval_text(mean, half, '+.2f')} points"
    )
    return [cell_of(case) for case in ratios], passing, text


def cell_of(case: str) -> str:
    """ "sgd from normal weights" of a row's case."""
    initialization, optimizer = case.split(", ")[-2:]
    return f"{optimizer} from {initialization.split()[0]} weights"


def deviation(values: list[float]) -> float:
    """The standard deviation over seeds; 0 for one."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    seeds: Annotated[int, typer.Option(help="paired runs", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="of a run; 0: the case's")] = 0,
    quick: Annotated[bool, typer.Option(help="digits, 2 seeds")] = False,
) -> None:
    """Train with exact and with compressed exchanges, and say what the rows say."""
    torch.set_num_threads(1)
    file = RowFile(out)
    case = QUICK if quick else FULL
    measure(replace(case, steps=steps or case.steps), range(min(seeds, 2) if quick else seeds), file)
    print(verdict([as_dict(row) for row in file.rows]))


if __name__ == "__main__":
    typer.run(main)
