"""Do partitions that learn by local losses reach what backprop reaches, and with how much less memory?

python -m benchmarks.local_learning --out benchmarks/results/local_learning.jsonl          # three hours on a core
python -m benchmarks.local_learning --case mlp --seeds 5 --out ...                         # one of mlp, gpt, vgg8b
python -m benchmarks.local_learning --budget flops --out ...                               # as much work as backprop
python -m benchmarks.local_learning --seeds 0 --rounds 5 --out ...                         # seconds of a step, idle
python -m benchmarks.local_learning --quick                                                # a minute
Runs whose rows are in --out already are not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.local_systems import SYSTEMS, Case, Costs, evaluate, measure_costs, shrunk
from benchmarks.pairs import paired_difference
from benchmarks.rows import Row, RowFile, as_dict
from benchmarks.verdicts import Rows, by_seed, interval_text, says
from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset, load_data

BENCH = "local_learning"
REFERENCE = "backprop"
# They compute what backprop does, bit for bit or up to rounding: their cost is what is asked, once.
ONCE = ("backprop, checkpointing", "backprop, accumulation")
LOCAL = ("sequential", "simultaneous, window 1", "simultaneous, window 2")
MATCH, LITTLE_MEMORY = 0.01, 0.5  # of the loss; of what backprop saves: what the claim's verdict asks for
BUDGETS = ("tokens", "flops")  # what the systems get alike
METRIC = {"tokens": "bits_per_byte", "images": "accuracy"}

CASES = {
    "mlp": Case(
        "mlp",
        ModelConfig(name="mlp", size="base"),
        DataConfig(name="fashion-mnist", batch_size=64),
        cuts=("layers.1", "layers.2"),
        heads="linear",
        steps=600,
        lr=1e-3,
        eval_batches=150,
    ),
    "gpt": Case(
        "gpt",
        ModelConfig(name="gpt", size="nano", context=64, tie_weights=False),
        DataConfig(name="stdlib", batch_size=8),
        cuts=("blocks.1", "blocks.2", "blocks.3"),
        heads="causal:1",
        steps=600,
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
        eval_batches=60,
    ),
}


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    case: Annotated[str, typer.Option(help="mlp, gpt, vgg8b, or several with commas")] = "mlp,gpt,vgg8b",
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
    lr: Annotated[float, typer.Option(help="instead of the case's")] = 0.0,
    quick: Annotated[bool, typer.Option(help="tiny models, 2 seeds, a minute")] = False,
) -> None:
    """Train every system on the same batches from the same initial values, seed by seed, and compare."""
    torch.set_num_threads(1)
    names = [one.strip() for one in systems.split(";") if one.strip()] or list(SYSTEMS)
    if unknown := [one for one in names if one not in SYSTEMS]:
        raise typer.BadParameter(f"no system {unknown[0]!r}; there are {'; '.join(SYSTEMS)}")
    if budget not in BUDGETS:
        raise typer.BadParameter(f"no budget {budget!r}: {' or '.join(BUDGETS)}")
    names = [REFERENCE, *(one for one in names if one != REFERENCE)]
    file = RowFile(out)
    for key in case.split(","):
        if key not in CASES:
            raise typer.BadParameter(f"no case {key!r}; there are {', '.join(CASES)}")
        chosen = CASES[key]
        if quick:
            chosen, seeds = shrunk(chosen), min(seeds, 2)
        chosen = replace(
            chosen,
            steps=steps or chosen.steps,
            heads=heads or chosen.heads,
            lr=lr or chosen.lr,
            cuts=tuple(cuts.split(",")) if cuts else chosen.cuts,
        )
        compare(chosen, names, range(first_seed, first_seed + seeds), budget, file, out, rounds)


def compare(
    case: Case,
    names: list[str],
    seeds: range,
    budget: str,
    file: RowFile,
    out: Path | None,
    rounds: int = 0,
) -> None:
    """Runs what is missing in the rows, appends it, and prints the table of this case."""
    data = load_data(case.data, context=case.model.context, seed=0)
    known = _known(out)
    costs = {name: _costs(case, data, name, known, file) for name in names}
    for seed in seeds:
        # The data's order follows the seed, too; the validation data does not.
        data = load_data(case.data, context=case.model.context, seed=seed)
        for name in names:
            steps = _steps(case, costs, name, budget)
            label = f"{case.training}, equal {budget}, seed {seed}"
            if (label, name, "val_loss") in known or (name in ONCE and seed != seeds[0]):
                continue
            trainer = SYSTEMS[name](case, data, seed)
            torch.manual_seed(seed)
            taken = len(trainer.train(steps))
            found = evaluate(trainer)
            values = [
                *((metric, value, _unit(metric), metric == "accuracy") for metric, value in found.items()),
                ("steps", float(taken), "optimizer steps, over all stages", False),
                ("total_flops", costs[name].flops * taken, "by torch's counter", False),
            ]
            for metric, value, unit, higher in values:
                file.add(Row(BENCH, label, name, metric, value, unit, higher))
                known[label, name, metric] = value
            print(f"{label}: {name}: {found}", flush=True)
    time_steps(case, names, rounds, known, file)
    _report(case, names, seeds, budget, costs, known, METRIC[data.spec.kind])


def time_steps(
    case: Case, names: list[str], rounds: int, known: dict[tuple[str, str, str], float], file: RowFile
) -> None:
    """The seconds of a step, in rounds in which the systems take turns, each round beginning with another one."""
    data = load_data(case.data, context=case.model.context, seed=0)
    for turn in range(rounds):
        label = f"{case.title}, round {turn}"
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            if (label, name, "step_seconds") in known:
                continue
            seconds = SYSTEMS[name](case, data, 0).step_seconds()
            file.add(Row(BENCH, label, name, "step_seconds", seconds, "s, a mean over stages", False))
            known[label, name, "step_seconds"] = seconds


def _steps(case: Case, costs: dict[str, Costs], name: str, budget: str) -> int:
    if budget == "tokens":
        return case.steps
    return max(len(case.cuts) + 1, round(case.steps * costs[REFERENCE].flops / costs[name].flops))


def _costs(
    case: Case, data: Dataset, name: str, known: dict[tuple[str, str, str], float], file: RowFile
) -> Costs:
    metrics = {
        "step_flops": "by torch's counter, a mean over stages",
        "saved_peak_bytes": "bytes that autograd holds at once, parameters left out",
        "peak_memory_bytes": "bytes by which the process grew at most, by the kernel",
    }
    label = f"{case.title}, costs"
    if all((label, name, metric) in known for metric in metrics):
        flops, saved, memory = (known[label, name, metric] for metric in metrics)
        return Costs(flops, int(saved), int(memory))
    costs = measure_costs(case, data, name)
    values = (costs.flops, float(costs.saved_bytes), float(costs.memory_bytes))
    for (metric, unit), value in zip(metrics.items(), values, strict=True):
        file.add(Row(BENCH, label, name, metric, value, unit, False))
        known[label, name, metric] = value
    return costs


def _known(out: Path | None) -> dict[tuple[str, str, str], float]:
    if out is None or not out.exists():
        return {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {
        (row["case"], row["system"], row["metric"]): math.nan if row["value"] is None else row["value"]
        for row in rows
        if row["bench"] == BENCH
    }


def _mean(values: dict[int, float]) -> str:
    return f"{statistics.mean(values.values()):.4f}" if values else ""


def _times(case: Case, name: str, known: dict[tuple[str, str, str], float]) -> str:
    """A step's seconds in units of backprop's, by rounds: the median."""
    ratios = [
        value / known[label, REFERENCE, metric]
        for (label, system, metric), value in known.items()
        if metric == "step_seconds" and system == name and label.startswith(f"{case.title}, round ")
    ]
    return f"{statistics.median(ratios):.2f} ×" if ratios else ""


def _unit(metric: str) -> str:
    return {"val_loss": "nats", "bits_per_byte": "bits", "accuracy": "fraction"}[metric]


def _report(
    case: Case,
    names: list[str],
    seeds: range,
    budget: str,
    costs: dict[str, Costs],
    known: dict[tuple[str, str, str], float],
    metric: str,
) -> None:
    def values(name: str, metric: str) -> dict[int, float]:
        found = {
            seed: known.get((f"{case.training}, equal {budget}, seed {seed}", name, metric)) for seed in seeds
        }
        return {seed: value for seed, value in found.items() if value is not None}

    table = Table(
        title=f"{case.training}, equal {budget}",
        caption="loss against backprop: relative, over paired seeds, 95 % interval; saved: for backward, at most",
    )
    for name in (
        "system",
        "seeds",
        metric,
        "val loss",
        "against backprop",
        "saved",
        "memory",
        "flops",
        "time",
    ):
        table.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    reference = values(REFERENCE, "val_loss")
    for name in names:
        losses = values(name, "val_loss")
        against = ""
        if losses and name != REFERENCE:
            found = paired_difference(losses, {seed: reference[seed] for seed in losses})
            interval = "" if found.num_pairs < 2 else f" ± {100 * found.half_width:.2f}"
            against = f"{100 * found.mean:+.2f}{interval} %"
        table.add_row(
            name,
            str(len(losses)),
            _mean(values(name, metric)),
            _mean(losses),
            against,
            f"{costs[name].saved_bytes / costs[REFERENCE].saved_bytes:.2f} ×",
            f"{costs[name].memory_bytes / costs[REFERENCE].memory_bytes:.2f} ×",
            f"{costs[name].flops / costs[REFERENCE].flops:.2f} ×",
            _times(case, name, known),
        )
    Console(width=max(150, Console().width)).print(table)


# ------------------------------------------------------------ the claim (T3)
def run_study(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the claim's study: all systems on all cases, or quick some on small ones; threads are set to one."""
    torch.set_num_threads(1)
    file = RowFile(None)
    for key, case in CASES.items():
        if not quick:
            for budget in BUDGETS:
                compare(case, list(SYSTEMS), range(5), budget, file, None, rounds=3)
        elif key != "vgg8b":
            compare(shrunk(case), [REFERENCE, *LOCAL], range(2), "tokens", file, None)
    return [as_dict(row) for row in file.rows]


def verdict(rows: Rows) -> str:
    """Whether local losses come within 1 % of backprop's held-out loss, sure to 95 %, at half of what backprop saves.

    Without conditions only where one and the same way does so in all cases.
    Saved are the bytes that autograd holds at once for the backward pass.
    """
    reference = by_seed(rows, REFERENCE, "val_loss")
    saved = {
        (row["case"].removesuffix(", costs"), row["system"]): row["value"]
        for row in rows
        if row["metric"] == "saved_peak_bytes"
    }
    passing: dict[str, list[str]] = {}
    found: list[tuple[float, str]] = []
    for case, losses in reference.items():
        title = next((one for one, _ in saved if case.startswith(one)), "")
        for name in LOCAL:
            theirs = by_seed(rows, name, "val_loss").get(case, {})
            pairs = theirs.keys() & losses.keys()
            if not pairs or (title, name) not in saved:
                continue
            one = paired_difference({s: theirs[s] for s in pairs}, {s: losses[s] for s in pairs})
            share = saved[title, name] / saved[title, REFERENCE]
            passes = one.upper95 <= MATCH and share <= LITTLE_MEMORY
            passing.setdefault(case, []).extend([name] if passes else [])
            interval = interval_text(100 * one.mean, 100 * one.half_width)
            where = f"{name}, {_short(case)}, seeds: {len(pairs)}"
            found.append(
                (one.mean, f"{where}: {interval} % loss against backprop, {share:.2f} x its saved bytes")
            )
    texts = "; ".join(text for _, text in sorted(found))
    some = [f"{_short(case)} by {' or '.join(names)}" for case, names in passing.items() if names]
    if not some:
        return says(None, texts)
    everywhere = [name for name in LOCAL if all(name in passing.get(case, []) for case in reference)]
    return says([] if everywhere else [f"the task is {' or '.join(some)}"], texts)


def _short(case: str) -> str:
    """ "mlp-base on fashion-mnist, 600 steps, equal tokens" of a row's case."""
    words = case.split(", ")
    return ", ".join(
        [words[0], *(word for word in words if word.endswith(" steps") or word.startswith("equal "))]
    )


if __name__ == "__main__":
    typer.run(main)
