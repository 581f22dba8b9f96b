"""Partition-wise training on slow links: how long to the same loss as data-parallel backprop, and with what memory?

python -m benchmarks.partitionwise --out benchmarks/results/partitionwise.jsonl       # hours on 2 quiet cores
python -m benchmarks.partitionwise --part times --out ...                             # of losses, times, memory
python -m benchmarks.partitionwise --quick                                            # two minutes
Every rank is an emulated host (see cluster/). A loss after a step does not depend on the link, and a step's time not
on what was learned. So losses come from whole runs on links that are not shaped; times from short runs on shaped ones,
in which the systems take turns; the time to a loss is the product of its steps and the seconds of one. Every system
has its best size of a step, of several, and a learning rate of its own for each, found on a seed outside of the study.
What is in --out already is not repeated, except times, of which every call adds rounds.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.partitionwise_report import (
    BENCH,
    MIDDLE,
    PROBES,
    TUNED_ON,
    Curve,
    Measured,
    print_memory,
    print_report,
    read_rows,
    verdict,
)
from benchmarks.partitionwise_runs import (
    ALONE,
    CASES,
    CURVE_OF,
    IN_LESS_MEMORY,
    NATIVE,
    RATE_OF,
    SYSTEMS,
    Case,
    ranks_of,
)
from benchmarks.rows import Row, RowFile, as_dict
from cluster.emulate import EmulatedNetwork

__all__ = ["run_study", "verdict"]

PARTS = ("losses", "times", "memory")
FACTORS = (1 / 3, 1.0, 3.0)  # of the case's learning rate
MORE_FACTORS = 2
TUNING_SEED = 1000
MIB = 2**20
_TIMEOUT_SECONDS = 3600.0
_WARM_UP = 3  # steps until queues are full
_PROBE_STEPS = 3
_TRIES = 4


class Bench:
    """Runs jobs on emulated hosts and turns their outcomes into rows."""

    def __init__(self, file: RowFile, measured: Measured) -> None:
        self._file = file
        self.measured = measured

    def losses(
        self, cases: Sequence[Case], ranks: int, systems: list[str], seed: int, chosen: Sequence[Case]
    ) -> None:
        """Whole runs on links that are not shaped: losses by step, and bytes. chosen: the sizes to run, of cases."""
        for case in chosen:
            title = f"{case.title(ranks)}, seed {seed}"
            own = [one for one in systems if one not in CURVE_OF]
            todo = [one for one in own if (title, one, f"val_loss_at_{case.steps}") not in self.measured]
            rates = {one: self._rate(cases, case, ranks, RATE_OF.get(one, one)) for one in todo}
            jobs = [_whole(case, one, ranks, seed, rates[one]) for one in todo]
            for found in _run(jobs, ranks, "none") if jobs else []:
                sent = found["nic_bytes_per_step"]
                self._add(title, found["name"], "nic_bytes_per_step", sent, "bytes, all ranks, by the kernel")
                for step, loss in found["losses"].items():  # the last one says that the run was whole
                    self._add(title, found["name"], f"val_loss_at_{step}", loss, "nats, by optimizer step")

    def _rate(self, cases: Sequence[Case], case: Case, ranks: int, system: str) -> float:
        """The learning rate that needs the fewest steps to the target's loss, in runs with another seed.

        Tried are a third of the case's, itself and three times it; then further on the side where the best one lies.
        That loss is the lowest of native with the first size of steps, which therefore has the rate with the lowest.
        """
        ranks = TUNED_ON if system == NATIVE else ranks  # its losses do not depend on them
        title = f"{case.title(ranks)}, tuning"
        if not case.tuned:
            return case.rate
        if known := self.measured.get((title, system, "learning_rate")):
            return known[-1]
        sets_goal = (case, system) == (cases[0], NATIVE)
        goal = math.nan
        if not sets_goal:
            self._rate(cases, cases[0], ranks, NATIVE)
            goal = MIDDLE * self.measured[f"{cases[0].title(TUNED_ON)}, tuning", NATIVE, "goal"][-1]
        found: dict[float, tuple[float, float]] = {}  # by factor: less is better

        def attempt(factors: Sequence[float]) -> float:
            rates = [case.rate * factor for factor in factors]
            jobs = [_whole(case, system, ranks, TUNING_SEED, rate) for rate in rates]
            for factor, rate, outcome in zip(factors, rates, _run(jobs, ranks, "none"), strict=True):
                at = sorted(map(int, outcome["losses"]))
                curve = Curve(tuple(at), tuple(outcome["losses"][str(step)] for step in at)).smoothed()
                loss, steps = math.inf, math.inf
                if at and all(map(math.isfinite, curve.losses)):
                    loss = curve.at_target() if sets_goal else curve.losses[-1]
                    steps = curve.steps_to(goal)
                found[factor] = (steps, loss)
                where = f"at_rate_{rate:.3g}"
                self._add(title, system, f"loss_{where}", loss, "nats, smoothed")
                if not sets_goal:
                    self._add(title, system, f"steps_{where}", steps, "to the target's loss")
            return min(found, key=lambda one: found[one])

        best = attempt(FACTORS)
        for _ in range(MORE_FACTORS):
            if min(found) < best < max(found):
                break
            best = attempt([best * (FACTORS[-1] if best == max(found) else FACTORS[0])])
        if sets_goal:
            self._add(title, system, "goal", found[best][1], "nats, smoothed")
        self._add(title, system, "learning_rate", case.rate * best, "")
        return case.rate * best

    def times(
        self, cases: Sequence[Case], ranks: int, systems: list[str], rates: list[str], rounds: int, steps: int
    ) -> None:
        """Short runs on shaped links; systems and sizes take turns, each round beginning with another one.

        One host alone takes its turns afterwards, the other cores being idle then.
        """
        for rate in rates:
            for chosen in (
                [one for one in systems if one != ALONE],
                [one for one in systems if one == ALONE],
            ):
                kinds = [(case, system) for case in cases for system in chosen]
                order = [kinds[(i + turn) % len(kinds)] for turn in range(rounds) for i in range(len(kinds))]
                settings = ("train.eval_every=0", "train.eval_batches=1")
                jobs = [
                    _job(one, case.overrides(one, ranks, 0, steps, case.rate, *settings), _WARM_UP)
                    for case, one in order
                ]
                hosts = ranks_of(chosen[0], ranks) if chosen else 0
                outcomes = _run(jobs, hosts, rate if hosts > 1 else "none") if jobs else []
                for number, ((case, system), found) in enumerate(zip(order, outcomes, strict=True)):
                    where = f"{case.title(ranks)}, {rate}, round {number // len(kinds)}"
                    seconds, at_work = found["seconds_per_step"], found["ranks_at_work"]
                    self._add(where, system, "step_seconds", seconds, f"s, a mean of {steps - _WARM_UP}")
                    self._add(where, system, "ranks_at_work", at_work, "of those that there are")

    def memory(self, case: Case, ranks: int, systems: list[str], cap_mib: int) -> None:
        """The most samples that a rank can take at once within a cap: a line through two runs, checked by a third.

        The model is cut by memory.
        """
        title, cap = case.title(ranks), cap_mib * MIB
        for system in systems:
            metric = f"largest_batch_in_{cap_mib}_MiB"
            if (title, system, metric) in self.measured:
                continue
            grown, largest = self._largest(case, ranks, system, cap)
            for batch, bytes_ in grown.items():
                self._add(
                    title, system, f"memory_at_batch_{batch}", bytes_, "bytes, growth of the largest rank"
                )
            if largest is None:
                print(f"{system}: found no batch that fits in {cap_mib} MiB: {grown}", file=sys.stderr)
            else:
                self._add(title, system, metric, largest, "samples that a rank takes at once", higher=True)

    def _largest(self, case: Case, ranks: int, system: str, cap: int) -> tuple[dict[int, int], int | None]:
        """Memory by batch of all that ran; and the largest batch, None where the line leads to none that fits."""
        grown = dict(zip(PROBES, self._grown(case, ranks, system, PROBES), strict=True))
        (low, below), (high, above) = grown.items()
        per_sample = max((above - below) / (high - low), 1.0)
        batch = low + int((cap - below) / per_sample)
        for _ in range(_TRIES):
            if batch < 1:
                break
            (grown[batch],) = self._grown(case, ranks, system, (batch,))
            if grown[batch] <= cap:
                return grown, batch
            batch -= math.ceil((grown[batch] - cap) / per_sample)
        return grown, None

    def _grown(self, case: Case, ranks: int, system: str, batches: tuple[int, ...]) -> list[int]:
        jobs = [
            _job(
                system,
                case.overrides(
                    system,
                    ranks,
                    0,
                    _PROBE_STEPS,
                    case.rate,
                    "train.eval_every=0",
                    "train.eval_batches=1",
                    "local.balance=memory",
                    f"data.batch_size={batch}",
                ),
                1,
            )
            for batch in (1, *batches)  # the first one loads what is imported late
        ]
        # Freed memory goes back to the system at once, so that what the kernel counts is in use.
        outcomes = _run(jobs, ranks, "none", {"MALLOC_MMAP_THRESHOLD_": "65536"})
        return [max(one["memory_bytes"]) for one in outcomes[1:]]

    def _add(
        self, case: str, system: str, metric: str, value: float, unit: str, higher: bool = False
    ) -> None:
        self._file.add(Row(BENCH, case, system, metric, float(value), unit, higher))
        self.measured.setdefault((case, system, metric), []).append(float(value))


def _whole(case: Case, system: str, ranks: int, seed: int, rate: float) -> dict[str, Any]:
    settings = case.overrides(system, ranks, seed, case.steps, rate, *case.evaluations(ranks))
    return _job(system, settings, 1)


def _job(system: str, settings: list[str], warm_up: int) -> dict[str, Any]:
    return {"name": system, "settings": settings, "warm_up": warm_up}


def _run(
    jobs: list[dict[str, Any]], ranks: int, rate: str, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The jobs' outcomes, in new processes, a rank on each host. Ends the benchmark where a job fails."""
    with tempfile.TemporaryDirectory() as name, EmulatedNetwork(hosts=ranks, rate=rate) as network:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        result = network.run(
            [sys.executable, "-m", "benchmarks.partitionwise_runs", str(folder)],
            environment={"OMP_NUM_THREADS": "1", **(environment or {})},
            timeout_seconds=_TIMEOUT_SECONDS,
            quiet=True,
        )
        if result.exit_code != 0:
            print("\n".join(result.output), file=sys.stderr)
            raise typer.Exit(result.exit_code)
        return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    case: Annotated[str, typer.Option(help="of " + ", ".join(CASES))] = ",".join(CASES),
    part: Annotated[str, typer.Option(help="of " + ", ".join(PARTS))] = ",".join(PARTS),
    systems: Annotated[str, typer.Option(help="semicolons between")] = ";".join(SYSTEMS),
    ranks: Annotated[str, typer.Option(help="numbers of ranks")] = "2,4",
    rates: Annotated[str, typer.Option(help="link speeds")] = "100mbit,1gbit",
    batches: Annotated[
        str, typer.Option(help="sizes of a step, in samples; all of the case by default")
    ] = "",
    seeds: Annotated[int, typer.Option(help="whole runs of each system", min=1)] = 3,
    rounds: Annotated[int, typer.Option(help="short runs of each system on each link", min=1)] = 5,
    round_steps: Annotated[int, typer.Option(help="steps of a short run", min=_WARM_UP + 1)] = 15,
    cap: Annotated[int, typer.Option(help="memory that a rank may need, MiB")] = 512,
    quick: Annotated[bool, typer.Option(help="the MLP on 2 ranks, few steps")] = False,
) -> None:
    """Compare partition-wise training with data-parallel backprop, native and at 2 bits, on the same links."""
    chosen = {name.strip(): None for name in case.split(",")}
    parts, named = ([one.strip() for one in text.split(mark)] for text, mark in ((part, ","), (systems, ";")))
    for given, known in ((chosen, CASES), (parts, PARTS), (named, SYSTEMS)):
        if unknown := [one for one in given if one not in known]:
            raise typer.BadParameter(f"no {unknown[0]!r}; there are {', '.join(known)}")
    cases = {name: CASES[name] for name in chosen}
    if quick:
        cases = {"mlp": (quick_case(),)}
        ranks, rates, seeds, rounds, round_steps = "2", "100mbit", 1, 2, 8
    some_sizes = batches.split(",") if batches else []
    there_are = [str(one.batch) for of_sizes in cases.values() for one in of_sizes]
    if unknown := [one for one in some_sizes if one not in there_are]:
        raise typer.BadParameter(f"no step of {unknown[0]!r} samples; there are {', '.join(there_are)}")
    measured = read_rows(out)
    bench = Bench(RowFile(out), measured)
    sizes, links = [int(one) for one in ranks.split(",")], rates.split(",")
    for size in sizes:
        for name, of_sizes in cases.items():
            some = [one for one in of_sizes if not some_sizes or str(one.batch) in some_sizes]
            if "losses" in parts:
                for seed in range(seeds):
                    bench.losses(of_sizes, size, named, seed, some)
            if "times" in parts:
                bench.times(some, size, named, links, rounds, round_steps)
            if "memory" in parts and name == "gpt":  # the MLP's memory is its parameters
                frugal = [one for one in IN_LESS_MEMORY if one.rpartition(", ")[0] in named]
                on_ranks = [one for one in named if one != ALONE]
                bench.memory(of_sizes[0], size, [*on_ranks, *frugal], cap)
                print_memory(of_sizes[0], size, cap, measured)
            print_report(of_sizes, size, links, seeds, measured)


def quick_case() -> Case:
    """Few steps of a smaller MLP, whose rows cannot be taken for the study's."""
    one = CASES["mlp"][0]
    settings = tuple(text.replace("model.size=base", "model.size=small") for text in one.settings)
    return Case(settings, one.batch, samples=40 * one.batch, every=5 * one.batch, held_out=512, tuned=False)


def run_study(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the claim (T5): losses and times of all systems on emulated hosts, which need root and Linux."""
    file = RowFile(None)
    bench = Bench(file, {})
    systems = list(SYSTEMS)
    for cases in [(quick_case(),)] if quick else list(CASES.values()):
        for seed in range(1 if quick else 3):
            bench.losses(cases, 2, systems, seed, cases)
        rates, rounds, steps = (["100mbit"], 2, 8) if quick else (["100mbit", "1gbit"], 5, 15)
        bench.times(cases, 2, systems, rates, rounds, steps)
    return [as_dict(row) for row in file.rows]


if __name__ == "__main__":
    typer.run(main)
