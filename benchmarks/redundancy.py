"""How many examples can later partitions do without in layer-wise training, and does it matter which?

python -m benchmarks.redundancy --out benchmarks/results/redundancy.jsonl       # ten minutes on one core
python -m benchmarks.redundancy --quick                                         # digits, half a minute
Every partition hands a share of its examples on to the next one, which learns from no others: those with the largest
local loss, or (the control) as many at random. All have the same initial values, batches and steps.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row, RowFile, as_dict
from benchmarks.verdicts import Rows, by_seed, differences, interval_text, says, systems
from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset, load_data
from efficient_dl.local_learning.learner import LocalLearner
from efficient_dl.local_learning.partition import partition
from efficient_dl.models import build_model

BENCH = "redundancy"
EVERYTHING = "all examples"
LEARNED_NATS = 0.1  # an example whose local loss is below has little left to teach
MARGIN_POINTS = 0.5  # of accuracy: what leaving examples out may cost
MOST_HELD_OUT = 100_000
MUCH = 0.5  # handing on no more than this is leaving "much" out


@dataclass(frozen=True)
class Case:
    """cuts: the pieces that begin partitions 1 to K − 1."""

    model: ModelConfig
    data: DataConfig
    steps: int
    lr: float = 1e-3
    cuts: tuple[str, ...] = ("layers.1", "layers.2")
    eval_samples: int = 5000

    @property
    def title(self) -> str:
        return (
            f"{self.model.name}-{self.model.size} on {self.data.name}, {self.data.batch_size} a batch, "
            f"{len(self.cuts) + 1} partitions, {self.steps} steps"
        )


FULL = Case(ModelConfig(name="mlp", size="small"), DataConfig(name="fashion-mnist", batch_size=128), 1000)
QUICK = Case(ModelConfig(name="mlp", size="mini"), DataConfig(name="digits", batch_size=64), 200)
KEPT = (0.7, 0.5, 0.3)


def name_of(keep: float, by: str) -> str:
    """A system's name."""
    return EVERYTHING if keep == 1.0 else f"{keep:g} by {by}"


def settings(kept: tuple[float, ...]) -> list[tuple[float, Literal["loss", "random"]]]:
    """All systems: everything, then each share by loss and at random."""
    both: tuple[Literal["loss", "random"], ...] = ("loss", "random")
    return [(1.0, "loss"), *((keep, by) for keep in kept for by in both)]


def train(
    case: Case, data: Dataset, keep: float, by: Literal["loss", "random"], seed: int
) -> dict[str, float]:
    """One run; accuracy of the model and of each partition's head, what each learned from, seconds a step."""
    model = build_model(case.model, data.spec, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return data.train_batch(step, batch_size=case.data.batch_size)

    learner = LocalLearner(
        partition(model, case.cuts),
        batch(0),
        lambda p: torch.optim.AdamW(p, case.lr, weight_decay=0.01),
        heads="linear",
        classes=data.spec.classes,
        keep_examples=keep,
        keep_by=by,
        seed=seed,
    )
    counted, handles = count_examples(learner)
    seconds = 0.0
    for step in range(case.steps):
        for optimizer in learner.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = case.lr * 0.5 * (1 + math.cos(math.pi * step / case.steps))
        inputs, targets = batch(step)
        began = time.process_time()
        learner.step(inputs, targets)
        seconds += time.process_time() - began
    for handle in handles:
        handle.remove()
    found = {"step_seconds": seconds / case.steps}
    for index, count in enumerate(counted):
        found[f"kept_by_block_{index}"] = count / (case.steps * case.data.batch_size)
    return found | evaluated(learner, case, data)


def count_examples(learner: LocalLearner) -> tuple[list[int], list[Any]]:
    """How many examples go into each partition from now on, and the hooks that count them."""
    counted = [0] * len(learner.partitions)

    def counter(index: int) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counted[index] += len(args[0])

        return count

    hooks = [one.module.register_forward_pre_hook(counter(one.index)) for one in learner.partitions]
    return counted, hooks


@torch.no_grad()
def evaluated(learner: LocalLearner, case: Case, data: Dataset) -> dict[str, float]:
    """By partition: the accuracy of its head, held out, and the share of training examples that it has learned."""
    found: dict[str, float] = {}
    ((inputs, targets),) = data.eval_batches(1, case.eval_samples)
    examples, labels = data.train_batch(0, batch_size=2 * case.data.batch_size)
    learner.partitions.model.eval()
    for index in learner.training:
        block = learner.block(index).eval()
        inputs, examples = block.body(inputs), block.body(examples)
        found[f"accuracy_block_{index}"] = accuracy(block.head(inputs), targets)
        losses = F.cross_entropy(block.head(examples), labels, reduction="none")
        found[f"learned_by_block_{index}"] = float((losses < LEARNED_NATS).float().mean())
    found["accuracy"] = found[f"accuracy_block_{learner.training[-1]}"]
    return found


def accuracy(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(-1) == targets).float().mean())


def measure(case: Case, kept: tuple[float, ...], seeds: range, file: RowFile) -> None:
    """Every system with every seed."""
    for seed in seeds:
        data = load_data(case.data, seed=seed)
        for keep, by in settings(kept):
            found = train(case, data, keep, by, seed)
            for metric, value in found.items():
                where, name, higher = f"{case.title}, seed {seed}", name_of(keep, by), "accuracy" in metric
                file.add(Row(BENCH, where, name, metric, value, unit_of(metric), higher))
            print(
                f"{case.title}, seed {seed}: {name_of(keep, by)}: accuracy {found['accuracy']:.4f}, "
                f"{1000 * found['step_seconds']:.1f} ms a step",
                flush=True,
            )


def unit_of(metric: str) -> str:
    if metric == "step_seconds":
        return "s of CPU"
    if metric.startswith("kept"):
        return "of a batch"
    if metric.startswith("learned"):
        return f"of training examples, local loss below {LEARNED_NATS}"
    return "held out"


# ------------------------------------------------------------ the claim
def run_study(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the claim's study; threads are set to one."""
    torch.set_num_threads(1)
    file = RowFile(None)
    measure(QUICK if quick else FULL, KEPT, range(3 if quick else 5), file)
    return [as_dict(row) for row in file.rows]


def verdict(rows: Rows) -> str:
    """How small a share may be handed on, accuracy at most the margin lower, sure to 95 % over paired seeds.

    In every case, as must be all larger shares. An interval is at least as wide as one held-out example to each side;
    where one example is more than the margin, nothing is decided.
    """
    reference = by_seed(rows, EVERYTHING, "accuracy")
    names = [one for one in systems(rows) if one != EVERYTHING]
    found: list[str] = []
    too_few: list[str] = []
    harmless = dict.fromkeys(names, bool(reference))
    for case, accuracies in reference.items():
        where = case.split(", ")[0]
        theirs = {name: by_seed(rows, name, "accuracy").get(case, {}) for name in names}
        held_out = held_out_examples(
            [*accuracies.values(), *(v for of in theirs.values() for v in of.values())]
        )
        if 1 / held_out > MARGIN_POINTS / 100:
            too_few.append(f"{where} ({held_out} held out, one is {100 / held_out:.2f} points)")
        for name in names:
            mean, half, _ = differences(theirs[name], accuracies)
            half = max(half, 1 / held_out)
            harmless[name] = harmless[name] and mean - half >= -MARGIN_POINTS / 100
            found.append(
                f"{where}: {name} ({100 * last_kept(rows, name):.0f} % reach the last partition) "
                f"{interval_text(100 * mean, 100 * half, '+.2f')} points of accuracy, "
                f"{100 * cost(rows, name, case):.0f} % of the CPU time"
            )
    found.append("learned by each partition's head, of training examples: " + learned(rows))
    if too_few:
        reason = f"too few examples to decide on a margin of {MARGIN_POINTS} points: {', '.join(too_few)}"
        return says(None, "; ".join([reason, *found]))
    return says(_conditions(rows, harmless), "; ".join(found))


def held_out_examples(accuracies: list[float]) -> int:
    """The least number of examples of which all these accuracies can be shares (of float32's precision)."""
    known = [one for one in accuracies if math.isfinite(one)]
    for number in range(1, MOST_HELD_OUT + 1):
        if all(abs(one * number - round(one * number)) < 1e-3 for one in known):
            return number
    raise ValueError(f"accuracies are no shares of at most {MOST_HELD_OUT} examples: {known[:5]}")


def _conditions(rows: Rows, harmless: dict[str, bool]) -> list[str] | None:
    """When the claim holds; None: never."""
    least = {by: _least_kept(harmless, by) for by in ("loss", "random")}
    by = (
        "loss"
        if least["loss"] <= MUCH or (least["random"] > MUCH and least["loss"] <= least["random"])
        else "random"
    )
    if least[by] == 1.0:
        return None
    conditions: list[str] = []
    if least[by] > MUCH:
        conditions.append(f"each partition hands on at least {least[by]:g} of its examples")
    elif by == "random":
        conditions.append(f"examples are left out at random (down to {least[by]:g} handed on), not by loss")
    cases = by_seed(rows, EVERYTHING, "accuracy")
    if max(cost(rows, name_of(least[by], by), case) for case in cases) >= 1:
        conditions.append("time does not count")
    return conditions


def _least_kept(harmless: dict[str, bool], by: str) -> float:
    """The smallest share that is harmless as all larger ones are; 1 for none."""
    least = 1.0
    for share in sorted((float(one.split(" by ")[0]) for one in harmless if one.endswith(by)), reverse=True):
        if not harmless[name_of(share, by)]:
            break
        least = share
    return least


def last_kept(rows: Rows, name: str) -> float:
    """The share of a batch that reaches the last partition."""
    metrics = sorted({str(row["metric"]) for row in rows if str(row["metric"]).startswith("kept_by_block_")})
    return mean_of(rows, name, metrics[-1])


def cost(rows: Rows, name: str, case: str) -> float:
    """CPU seconds of a step against training on everything."""
    seconds, reference = (by_seed(rows, one, "step_seconds")[case].values() for one in (name, EVERYTHING))
    return statistics.mean(seconds) / statistics.mean(reference)


def learned(rows: Rows) -> str:
    metrics = sorted(
        {str(row["metric"]) for row in rows if str(row["metric"]).startswith("learned_by_block_")}
    )
    return ", ".join(f"{100 * mean_of(rows, EVERYTHING, metric):.0f} %" for metric in metrics)


def mean_of(rows: Rows, system: str, metric: str) -> float:
    values = [value for of_case in by_seed(rows, system, metric).values() for value in of_case.values()]
    return statistics.mean(values)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    seeds: Annotated[int, typer.Option(help="paired runs", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="of a run; 0: the case's")] = 0,
    kept: Annotated[str, typer.Option(help="shares, with commas")] = ",".join(map(str, KEPT)),
    quick: Annotated[bool, typer.Option(help="digits, 3 seeds")] = False,
) -> None:
    """Train with all examples and with shares of them, chosen by loss and at random; say what the rows say."""
    torch.set_num_threads(1)
    file = RowFile(out)
    case = QUICK if quick else FULL
    shares = tuple(float(one) for one in kept.split(","))
    measure(replace(case, steps=steps or case.steps), shares, range(min(seeds, 3) if quick else seeds), file)
    print(verdict([as_dict(row) for row in file.rows]))


if __name__ == "__main__":
    typer.run(main)
