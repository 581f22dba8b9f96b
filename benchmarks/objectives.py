"""Do losses that do not squash the gradient reach a target accuracy in fewer steps, each at its own best rate?

python -m benchmarks.objectives --out benchmarks/results/objectives.jsonl                  # minutes on one core
python -m benchmarks.objectives --case fashion-mnist --out ...                             # longer
python -m benchmarks.objectives --quick                                                    # two objectives, a minute
Every objective gets the same grid of learning rates. The rate is chosen by the mean steps to the target over seeds
that the comparison does not use; a run that does not get there counts with one evaluation more than it had.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.pairs import paired_difference
from benchmarks.rows import Row, RowFile, as_dict
from benchmarks.verdicts import Rows, by_seed, interval_text, says
from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset, load_data
from efficient_dl.models import build_model
from efficient_dl.objectives import OBJECTIVES, make_objective

BENCH = "objectives"
REFERENCE = "cross-entropy"
NON_SQUASHING = ("expgb", "pow3gb", "linear")  # the thesis's
FIRST_TUNING_SEED = 1000
RATES = tuple(
    1e-3 * 10 ** (i / 2) for i in range(8)
)  # 0.001 to 3.16; then two between the best one and its neighbours
MOMENTUM = 0.9


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    data: DataConfig
    steps: int
    evaluate_every: int
    eval_samples: int
    target: float  # accuracy


CASES = {
    "digits": Case(
        ModelConfig(name="mlp", size="micro"), DataConfig(name="digits", batch_size=64), 400, 5, 400, 0.95
    ),
    "fashion-mnist": Case(
        ModelConfig(name="mlp", size="micro"),
        DataConfig(name="fashion-mnist", batch_size=64),
        1000,
        20,
        2000,
        0.84,
    ),
}


@dataclass(frozen=True)
class Run:
    """steps_to_target: one evaluation beyond the budget where it was not reached. norms: first and last matrix's."""

    steps_to_target: int
    reached: bool
    accuracy: float  # at the end; of a run that diverged, the last that was finite
    first_norms: tuple[float, float]  # gradient norms of the first and the last matrix in the first step
    late_norms: tuple[float, float]  # and halfway


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    case: Annotated[str, typer.Option(help="digits, fashion-mnist")] = "digits",
    objectives: Annotated[str, typer.Option(help="with commas; empty: all")] = "",
    seeds: Annotated[int, typer.Option(help="of the comparison", min=1)] = 5,
    tuning_seeds: Annotated[int, typer.Option(help="of the choice of the rate", min=1)] = 2,
    target: Annotated[float, typer.Option(help="accuracy; 0: the case's")] = 0.0,
    steps: Annotated[int, typer.Option(help="of a run; 0: the case's")] = 0,
    quick: Annotated[bool, typer.Option(help="two objectives, 2 seeds, a quarter of the steps")] = False,
) -> None:
    """Tune every objective's learning rate, then compare them seed by seed."""
    torch.set_num_threads(1)
    chosen = CASES[case]
    chosen = replace(chosen, steps=steps or chosen.steps, target=target or chosen.target)
    names = [one for one in objectives.split(",") if one] or list(OBJECTIVES)
    if quick:
        names, seeds, tuning_seeds = [REFERENCE, "expgb"], min(seeds, 2), 1
        chosen = replace(chosen, steps=chosen.steps // 4)
    compare(chosen, names, seeds, tuning_seeds, RowFile(out))


def compare(chosen: Case, names: list[str], seeds: int, tuning_seeds: int, file: RowFile) -> None:
    """Tunes each objective, compares it with cross-entropy seed by seed, adds the rows and prints a table."""
    names = [REFERENCE, *(one for one in names if one != REFERENCE)]
    label = (
        f"mlp-{chosen.model.size} on {chosen.data.name}, {chosen.data.batch_size} a batch, {chosen.steps} steps, "
        f"sgd {MOMENTUM}, target {chosen.target:g}"
    )
    table = Table(
        "objective",
        "best rate",
        "rates that reach it",
        "steps to target",
        "against cross-entropy",
        "accuracy",
    )
    found: dict[str, dict[int, Run]] = {}
    for name in names:
        rate, reaching, tried = tune(chosen, name, tuning_seeds)
        runs = {seed: train(chosen, name, rate, seed) for seed in range(seeds)}
        found[name] = runs
        add_rows(file, label, name, rate, reaching, tried, runs)
        table.add_row(*cells(name, rate, reaching, tried, runs, found[REFERENCE]))
        print(f"{name}: rate {rate:.4g}, {[run.steps_to_target for run in runs.values()]}", flush=True)
    for name in names[1:]:
        difference = paired_difference(*(steps_by_seed(found[one]) for one in (name, REFERENCE)))
        for metric, value in (("mean", difference.mean), ("half_width", difference.half_width)):
            file.add(
                Row(BENCH, label, name, f"steps_against_cross_entropy_{metric}", 100 * value, "%", False)
            )
    Console(width=140).print(table)


def tune(case: Case, name: str, num_seeds: int) -> tuple[float, int, int]:
    """The best rate of the grid and of two finer ones around it; how many rates of the grid reach the target."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + num_seeds)
    scores: dict[float, tuple[float, float]] = {}

    def score(rate: float) -> bool:
        runs = [train(case, name, rate, seed, stops_at_target=True) for seed in seeds]
        mean_steps = statistics.mean(run.steps_to_target for run in runs)
        scores[rate] = (mean_steps, -statistics.mean(run.accuracy for run in runs))
        return all(run.reached for run in runs)

    reaching = sum([score(rate) for rate in RATES])
    best = min(scores, key=lambda rate: scores[rate])
    for factor in (10**-0.25, 10**0.25):
        score(best * factor)
    return min(scores, key=lambda rate: scores[rate]), reaching, len(RATES)


def train(case: Case, name: str, rate: float, seed: int, stops_at_target: bool = False) -> Run:
    """One run at a constant learning rate."""
    data = load(case, seed)
    model = build_model(case.model, data.spec, seed)
    loss_of = make_objective(name)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)
    held_out = validation(case, data)
    reached_at, accuracy = 0, 0.0
    norms: list[tuple[float, float]] = []
    for step in range(case.steps):
        inputs, targets = data.train_batch(step, batch_size=case.data.batch_size)
        loss = loss_of(model(inputs), targets)
        if not bool(loss.isfinite()):
            break
        optimizer.zero_grad()
        loss.backward()
        if step in (0, case.steps // 2):
            norms.append(ends(model))
        optimizer.step()
        if (step + 1) % case.evaluate_every == 0:
            accuracy = accuracy_of(model, *held_out)
            if accuracy >= case.target and not reached_at:
                reached_at = step + 1
                if stops_at_target:
                    break
    norms += [(math.nan, math.nan)] * (2 - len(norms))
    return Run(reached_at or case.steps + case.evaluate_every, bool(reached_at), accuracy, norms[0], norms[1])


_loaded: dict[tuple[str, int], Dataset] = {}


def load(case: Case, seed: int) -> Dataset:
    key = case.data.name, seed
    if key not in _loaded:
        _loaded[key] = load_data(case.data, seed=seed)
    return _loaded[key]


def validation(case: Case, data: Dataset) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*data.eval_batches(1, case.eval_samples), strict=True)
    return torch.cat(inputs), torch.cat(targets)


@torch.no_grad()
def accuracy_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return float((model(inputs).argmax(-1) == targets).float().mean())


def ends(model: nn.Module) -> tuple[float, float]:
    """Gradient norms of the first and the last matrix."""
    norms = [float(one.grad.norm()) for one in model.parameters() if one.dim() == 2 and one.grad is not None]
    return norms[0], norms[-1]


def steps_by_seed(runs: dict[int, Run]) -> dict[int, float]:
    return {seed: float(run.steps_to_target) for seed, run in runs.items()}


def add_rows(
    file: RowFile, label: str, name: str, rate: float, reaching: int, tried: int, runs: dict[int, Run]
) -> None:
    file.add(Row(BENCH, label, name, "learning_rate", rate, "best on seeds of its own", False))
    file.add(Row(BENCH, label, name, "rates_that_reach_the_target", float(reaching), f"of {tried}", True))
    for seed, run in runs.items():
        for metric, value, unit, higher in (
            ("steps_to_target", float(run.steps_to_target), "steps", False),
            ("reached", float(run.reached), "0 or 1", True),
            ("accuracy", run.accuracy, "at the end", True),
            ("gradient_norm_first_layer_start", run.first_norms[0], "", False),
            ("gradient_norm_last_layer_start", run.first_norms[1], "", False),
            ("gradient_norm_first_layer_halfway", run.late_norms[0], "", False),
            ("gradient_norm_last_layer_halfway", run.late_norms[1], "", False),
        ):
            file.add(Row(BENCH, f"{label}, seed {seed}", name, metric, value, unit, higher))


def cells(
    name: str, rate: float, reaching: int, tried: int, runs: dict[int, Run], reference: dict[int, Run]
) -> list[str]:
    difference = paired_difference(steps_by_seed(runs), steps_by_seed(reference))
    missed = sum(not run.reached for run in runs.values())
    steps = statistics.mean(run.steps_to_target for run in runs.values())
    accuracy = statistics.mean(run.accuracy for run in runs.values())
    return [
        name,
        f"{rate:.4g}" + (" (end of the grid)" if not min(RATES) < rate < max(RATES) else ""),
        f"{reaching} of {tried}",
        f"{steps:.0f}" + (f" ({missed} never)" if missed else ""),
        "" if name == REFERENCE else f"{100 * difference.mean:+.1f} ± {100 * difference.half_width:.1f} %",
        f"{100 * accuracy:.2f} %",
    ]


# ------------------------------------------------------------ the claim (T2)
def run_study(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the claim's study: of digits, and in full of Fashion-MNIST, too; threads are set to one."""
    torch.set_num_threads(1)
    file = RowFile(None)
    if quick:
        case = replace(CASES["digits"], steps=100, target=0.9)
        compare(case, [REFERENCE, *NON_SQUASHING], 3, 1, file)
    else:
        for case in CASES.values():
            compare(case, list(OBJECTIVES), 5, 2, file)
    return [as_dict(row) for row in file.rows]


def verdict(rows: Rows) -> str:
    """Whether a loss that does not squash needs fewer steps than cross-entropy, sure to 95 % over paired seeds."""
    reference = by_seed(rows, REFERENCE, "steps_to_target")
    faster: list[str] = []
    found: list[str] = []
    compared = 0
    for case, steps in reference.items():
        texts: list[str] = []
        for name in NON_SQUASHING:
            theirs = by_seed(rows, name, "steps_to_target").get(case, {})
            pairs = theirs.keys() & steps.keys()
            if not pairs:
                continue
            compared += 1
            one = paired_difference({s: theirs[s] for s in pairs}, {s: steps[s] for s in pairs})
            texts.append(f"{name} {interval_text(100 * one.mean, 100 * one.half_width)} %")
            if one.upper95 < 0:
                faster.append(f"{name} on {short(case)}")
        found.append(f"steps against cross-entropy, {short(case)}: {', '.join(texts)}")
    if not faster:
        return says(None, "; ".join(found))
    return says(
        [] if len(faster) == compared else [f"the loss and the task are {' or '.join(faster)}"],
        "; ".join(found),
    )


def short(case: str) -> str:
    """ "digits to 0.95" of a row's case."""
    data, target = case.split(" on ")[1].split(",")[0], case.rpartition("target ")[2]
    return f"{data} to {target}"


if __name__ == "__main__":
    typer.run(main)
