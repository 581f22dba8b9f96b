"""Do partitions that learn by local losses reach what backprop reaches, and with how much less memory?

python -m benchmarks.local_learning --out benchmarks/results/local_learning.jsonl          # five hours on a core
python -m benchmarks.local_learning --case mlp --seeds 5 --out ...                         # one of mlp, gpt, vgg8b
python -m benchmarks.local_learning --budget flops --out ...                               # as much work as backprop
python -m benchmarks.local_learning --seeds 0 --rounds 5 --out ...                         # seconds of a step, idle
python -m benchmarks.local_learning --quick                                                # a minute
Each system has a learning rate of its own, found on a seed outside of the study and training data that it does not
train on. Runs whose rows are in --out already are not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.local_systems import (
    SAME,
    SYSTEMS,
    Case,
    Costs,
    evaluate,
    loss_ahead,
    measure_costs,
    shrunk,
)
from benchmarks.rows import Row, RowFile, as_dict
from benchmarks.studies import paired
from benchmarks.verdicts import Rows, by_seed, interval_text, says
from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset, load_data

BENCH = "local_learning"
REFERENCE = "backprop"
CONTROLS = ("backprop, checkpointing", "backprop, accumulation")  # backprop in less memory
LOCAL = (
    "simultaneous, window 1",
    "sequential",
    "simultaneous, window 2",
    "simultaneous, window 1, checkpointing",
)
MATCH = {"bits_per_byte": 1.0, "accuracy": 0.3}  # percent of the former, points of the latter
LITTLE_MEMORY = 0.5  # of the bytes that a step of backprop needs beside parameters and optimizer
LEAST_SEEDS = 3
METRIC = {"tokens": "bits_per_byte", "images": "accuracy"}
BUDGETS = ("tokens", "flops")  # what the systems get alike
FACTORS = (1 / 3, 1.0, 3.0)  # of the case's learning rate; more while the best one is the last on its side
MORE_FACTORS = 2
TUNING_SEED = 1000

CASES = {
    "mlp": Case(
        "mlp",
        ModelConfig(name="mlp", size="base"),
        DataConfig(name="fashion-mnist", batch_size=64),
        cuts=("layers.1", "layers.2"),
        heads="linear",
        steps=1000,
        lr=1e-3,
        eval_batches=157,
    ),
    "gpt": Case(
        "gpt",
        ModelConfig(name="gpt", size="nano", context=64, tie_weights=False),
        DataConfig(name="stdlib", batch_size=8),
        cuts=("blocks.1", "blocks.2", "blocks.3"),
        heads="causal:1",
        steps=1000,
        lr=3e-3,
        eval_batches=96,
    ),
    "vgg8b": Case(
        "vgg8b",
        ModelConfig(name="vgg8b", size="mini"),
        DataConfig(name="fashion-mnist", batch_size=64),
        cuts=("features.1", "features.3", "features.6"),
        heads="predsim",
        steps=300,
        lr=1e-3,
        eval_batches=157,
    ),
}

CASES["gpt-linear"] = replace(CASES["gpt"], name="gpt-linear", heads="linear")

Known = dict[tuple[str, str, str], float]


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    case: Annotated[str, typer.Option(help="of " + ", ".join(CASES))] = ",".join(CASES),
    systems: Annotated[str, typer.Option(help="with semicolons; empty: all")] = "",
    seeds: Annotated[
        int, typer.Option(help="paired runs of each system; 0: only what a step costs", min=0)
    ] = 5,
    first_seed: Annotated[int, typer.Option(help="the seeds begin here", min=0)] = 0,
    budget: Annotated[
        str, typer.Option(help="what all systems get alike: tokens, or flops (backprop's)")
    ] = "tokens",
    rounds: Annotated[int, typer.Option(help="of short runs in turn, for the seconds of a step", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="instead of the case's; of backprop where flops are equal")] = 0,
    heads: Annotated[str, typer.Option(help="instead of the case's")] = "",
    cuts: Annotated[str, typer.Option(help="instead of the case's: pieces, with commas")] = "",
    lr: Annotated[float, typer.Option(help="for all systems, instead of one of their own")] = 0.0,
    quick: Annotated[bool, typer.Option(help="tiny models, 3 seeds, a minute")] = False,
) -> None:
    """Train every system on the same batches from the same initial values, seed by seed, and compare."""
    torch.set_num_threads(1)
    names = [one.strip() for one in systems.split(";") if one.strip()] or list(SYSTEMS)
    if unknown := [one for one in names if one not in SYSTEMS]:
        raise typer.BadParameter(f"no system {unknown[0]!r}; there are {'; '.join(SYSTEMS)}")
    if budget not in BUDGETS:
        raise typer.BadParameter(f"no budget {budget!r}: {' or '.join(BUDGETS)}")
    study = Study(RowFile(out), _known(out))
    for key in case.split(","):
        if key not in CASES:
            raise typer.BadParameter(f"no case {key!r}; there are {', '.join(CASES)}")
        chosen = CASES[key]
        if quick:
            chosen, seeds = shrunk(chosen), min(seeds, 3)
        chosen = replace(
            chosen,
            steps=steps or chosen.steps,
            heads=heads or chosen.heads,
            lr=lr or chosen.lr,
            tuned=chosen.tuned and not lr,
            cuts=tuple(cuts.split(",")) if cuts else chosen.cuts,
        )
        study.compare(chosen, names, range(first_seed, first_seed + seeds), budget, rounds)


class Study:
    """Runs what is missing in the rows, and appends it."""

    def __init__(self, file: RowFile, known: Known) -> None:
        self._file, self._known = file, known

    def compare(self, case: Case, names: list[str], seeds: range, budget: str, rounds: int = 0) -> None:
        """All systems on a case, whose table is printed; backprop is always among them."""
        names = [REFERENCE, *(one for one in names if one != REFERENCE)]
        data = load_data(case.data, context=case.model.context, seed=0)
        costs = {name: self._costs(case, data, name) for name in names}
        for seed in seeds:
            # The data's order follows the seed, too; the validation data does not.
            data = load_data(case.data, context=case.model.context, seed=seed)
            for name in names:
                self._run(case, data, name, seed, budget, costs)
        self._time_steps(case, names, rounds)
        metric = METRIC[data.spec.kind]
        _report(case, names, seeds, budget, costs, self._known, metric)

    def _run(
        self, case: Case, data: Dataset, name: str, seed: int, budget: str, costs: dict[str, Costs]
    ) -> None:
        label = f"{case.training}, equal {budget}, seed {seed}"
        if (label, name, "val_loss") in self._known or (budget == "tokens" and name in SAME and seed):
            return  # the same bits as another system: shown once
        rate = self._rate(case, name)
        steps = case.steps
        if budget == "flops":
            steps = max(len(case.cuts) + 1, round(steps * costs[REFERENCE].flops / costs[name].flops))
        trainer = SYSTEMS[name](replace(case, lr=rate), data, seed)
        torch.manual_seed(seed)
        taken = len(trainer.train(steps))
        found = evaluate(trainer)
        self._add(label, name, "steps", float(taken), "optimizer steps, over all stages")
        self._add(label, name, "total_flops", costs[name].flops * taken, "by torch's formulas")
        for metric, value in sorted(found.items()):  # val_loss comes last: with it the run counts as done
            self._add(label, name, metric, value, _unit(metric), metric == "accuracy")
        print(f"{label}: {name}: {found}", flush=True)

    def _rate(self, case: Case, name: str) -> float:
        """The system's learning rate: the best one on training data that no step has seen, of a seed of its own."""
        if not case.tuned:
            return case.lr
        name = SAME.get(name, name)
        label = f"{case.training}, tuning"
        if (rate := self._known.get((label, name, "learning_rate"))) is not None:
            return rate
        data = load_data(case.data, context=case.model.context, seed=TUNING_SEED)
        losses: dict[float, float] = {}

        def loss(factor: float) -> float:
            if factor not in losses:
                trainer = SYSTEMS[name](replace(case, lr=case.lr * factor), data, TUNING_SEED)
                torch.manual_seed(TUNING_SEED)
                trainer.train(case.steps)
                found = loss_ahead(trainer)
                losses[factor] = found if math.isfinite(found) else math.inf
                text = f"nats, at {case.lr * factor:.3g}"
                self._add(label, name, f"loss_at_{factor:.3g}_of_the_rate", losses[factor], text)
            return losses[factor]

        best = min(FACTORS, key=loss)
        for _ in range(MORE_FACTORS):
            if min(losses) < best < max(losses):
                break
            best = min((best, best * FACTORS[-1] if best == max(losses) else best * FACTORS[0]), key=loss)
        rate = case.lr * best
        self._add(label, name, "learning_rate", rate, "")
        return rate

    def _costs(self, case: Case, data: Dataset, name: str) -> Costs:
        metrics = {
            "step_flops": "by torch's formulas, a mean over stages",
            "saved_peak_bytes": "bytes that autograd holds at once, parameters left out",
            "live_peak_bytes": "bytes by which all tensors grow in a step at most",
            "state_bytes": "bytes of parameters, heads and optimizer",
        }
        label = f"{case.title}, costs"
        if all((label, name, metric) in self._known for metric in metrics):
            flops, *sizes = (self._known[label, name, metric] for metric in metrics)
            return Costs(flops, *map(int, sizes))
        costs = measure_costs(case, data, name)
        values = (costs.flops, costs.saved_bytes, costs.live_bytes, costs.state_bytes)
        for (metric, unit), value in zip(metrics.items(), values, strict=True):
            self._add(label, name, metric, float(value), unit)
        return costs

    def _time_steps(self, case: Case, names: list[str], rounds: int) -> None:
        """A step's seconds, in rounds in which the systems take turns, each round beginning with another one."""
        data = load_data(case.data, context=case.model.context, seed=0)
        for turn in range(rounds):
            label = f"{case.title}, round {turn}"
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                if (label, name, "step_seconds") not in self._known:
                    seconds = SYSTEMS[name](case, data, 0).step_seconds()
                    self._add(label, name, "step_seconds", seconds, "s, a mean over stages")

    def _add(
        self, case: str, system: str, metric: str, value: float, unit: str, higher: bool = False
    ) -> None:
        self._file.add(Row(BENCH, case, system, metric, value, unit, higher))
        self._known[case, system, metric] = value


def _known(out: Path | None) -> Known:
    if out is None or not out.exists():
        return {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {
        (row["case"], row["system"], row["metric"]): math.nan if row["value"] is None else row["value"]
        for row in rows
        if row["bench"] == BENCH
    }


def _unit(metric: str) -> str:
    return {"val_loss": "nats", "bits_per_byte": "bits", "accuracy": "fraction"}[metric]


def gap(metric: str, theirs: Mapping[int, float], backprop: Mapping[int, float]) -> tuple[float, float]:
    """By how much a system is worse than backprop over common seeds, and half of the 95 % interval.

    In percent of bits per byte, or points of accuracy. Infinite if a run gave no finite number; the half is NaN for one
    pair.
    """
    seeds = sorted(theirs.keys() & backprop.keys())
    if metric == "accuracy":
        worse = {seed: 100 * (backprop[seed] - theirs[seed]) for seed in seeds}
    else:
        worse = {seed: 100 * (theirs[seed] / backprop[seed] - 1) for seed in seeds}
    if not all(math.isfinite(one) for one in worse.values()):
        return math.inf, math.inf
    if len(worse) < 2:
        return next(iter(worse.values())), math.nan
    found = paired(worse, dict.fromkeys(worse, 0.0))
    return found.mean, found.half_width


def _report(
    case: Case,
    names: list[str],
    seeds: range,
    budget: str,
    costs: dict[str, Costs],
    known: Known,
    metric: str,
) -> None:
    def values(name: str) -> dict[int, float]:
        label = f"{case.training}, equal {budget}, seed "
        found = {seed: known.get((f"{label}{seed}", name, metric)) for seed in seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    unit = "points" if metric == "accuracy" else "%"
    table = Table(
        title=f"{case.training}, equal {budget}",
        caption=f"worse than backprop in {unit}, over paired seeds, 95 % interval; saved for backward, live in a step, "
        "state between steps: bytes at most, FLOPs and seconds of a step: as parts of backprop's",
    )
    for column in ("system", "seeds", metric, "worse", "saved", "live", "state", "flops", "time"):
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    base = costs[REFERENCE]
    for name in names:
        found, own = values(name), costs[name]
        worse = ""
        if found and name != REFERENCE:
            worse = interval_text(*gap(metric, found, values(REFERENCE)), "+.2f")
        parts = (
            own.saved_bytes / base.saved_bytes,
            own.live_bytes / base.live_bytes,
            own.state_bytes / base.state_bytes,
            own.flops / base.flops,
        )
        table.add_row(
            name,
            str(len(found)),
            f"{statistics.mean(found.values()):.4f}" if found else "",
            worse,
            *(f"{one:.2f} ×" for one in parts),
            _times(case, name, known),
        )
    Console(width=max(150, Console().width)).print(table)


def _times(case: Case, name: str, known: Known) -> str:
    """A step's seconds in units of backprop's, by rounds: the median."""
    ratios = [
        value / known[label, REFERENCE, metric]
        for (label, system, metric), value in known.items()
        if metric == "step_seconds" and system == name and label.startswith(f"{case.title}, round ")
    ]
    return f"{statistics.median(ratios):.2f} ×" if ratios else ""


# ------------------------------------------------------------ the claim (T3)
def run_study(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the claim's study: all systems on all cases, or quick some on small ones; threads are set to one."""
    torch.set_num_threads(1)
    file = RowFile(None)
    study = Study(file, {})
    for key, case in CASES.items():
        if not quick:
            for budget in BUDGETS:
                study.compare(case, list(SYSTEMS), range(5), budget, rounds=3)
        elif key in ("mlp", "gpt"):
            study.compare(shrunk(case), [REFERENCE, *CONTROLS, *LOCAL], range(3), "tokens")
    return [as_dict(row) for row in file.rows]


def verdict(rows: Rows) -> str:
    """Whether local losses match backprop, sure to 95 %, in half of the memory that a step of it needs, or less.

    Matched are bits per byte to 1 %, or accuracy to 0.3 points. Memory: by how much all tensors grow in a step.
    Without conditions only where one and the same way does so in all cases, in less memory than the controls, which
    compute what backprop does.
    """
    live = {
        (row["case"].removesuffix(", costs"), row["system"]): float(row["value"])
        for row in rows
        if row["metric"] == "live_peak_bytes"
    }
    passing: dict[str, list[str]] = {}
    beaten = True
    found: list[tuple[bool, str]] = []
    cases = [
        (metric, case, seeds) for metric in MATCH for case, seeds in by_seed(rows, REFERENCE, metric).items()
    ]
    for metric, case, backprop in cases:
        title = next((one for one, _ in live if case.startswith(f"{one}, ")), "")
        control = min(
            (live[title, one] / live[title, REFERENCE] for one in CONTROLS if (title, one) in live),
            default=math.inf,
        )
        for name in LOCAL:
            # At equal tokens what computes the same bits as another system has its results.
            theirs = by_seed(rows, name, metric).get(case, {})
            if name in SAME and case.endswith("equal tokens"):
                theirs = by_seed(rows, SAME[name], metric).get(case, {})
            pairs = theirs.keys() & backprop.keys()
            if not pairs or (title, name) not in live:
                continue
            mean, half = gap(metric, theirs, backprop)
            share = live[title, name] / live[title, REFERENCE]
            passes = len(pairs) >= LEAST_SEEDS and mean + half <= MATCH[metric] and share <= LITTLE_MEMORY
            if passes:
                passing.setdefault(case, []).append(name)
                beaten = beaten and share < control
            unit = "points" if metric == "accuracy" else "% more bits"
            found.append(
                (
                    len(pairs) < LEAST_SEEDS,
                    f"{name}, {short(case)}: {interval_text(-mean if unit == 'points' else mean, half)} {unit}, "
                    f"{share:.2f} x backprop's memory (the best control: {control:.2f} x), seeds: {len(pairs)}",
                )
            )
    texts = "; ".join(text for _, text in sorted(found, key=lambda one: one[0]))
    if not passing:
        return says(None, texts)
    everywhere = [name for name in LOCAL if all(name in passing.get(case, []) for _, case, _ in cases)]
    some = [f"{short(case)} by {' or '.join(names)}" for case, names in passing.items()]
    conditions = [] if everywhere else [f"the task is {' or '.join(some)}"]
    if not beaten:
        conditions.append("backprop that checkpoints or accumulates, and needs less still, does not count")
    return says(conditions, texts)


def short(case: str) -> str:
    """ "mlp-base on fashion-mnist, heads linear, 600 steps, equal tokens" of a row's case."""
    words = case.split(", ")
    kept = (word for word in words[1:] if word.endswith(" steps") or word.startswith(("heads ", "equal ")))
    return ", ".join([words[0], *kept])


if __name__ == "__main__":
    typer.run(main)
