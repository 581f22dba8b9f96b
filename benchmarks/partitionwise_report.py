"""Composes what benchmarks.partitionwise has measured: seconds to a loss = steps to it x seconds of a step."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.partitionwise_runs import (
    ALONE,
    CURVE_OF,
    DATA_PARALLEL,
    IN_LESS_MEMORY,
    LENGTH,
    NATIVE,
    RATE_OF,
    SYSTEMS,
    Case,
)
from benchmarks.verdicts import Rows, says, span

BENCH = "partitionwise"
FASTER = 1.3  # what the claim's verdict asks for
LEAST_SEEDS, LEAST_ROUNDS = 3, 3
SMOOTHED = 5  # evaluations
TARGETS = (1.0, 1.02, 1.05)  # times native's loss after a part of its run
MIDDLE = 1.02  # the one that tables show
DRAWS = 2000  # of the bootstrap
Measured = dict[tuple[str, str, str], list[float]]
"""Values by (case, system, metric); several where a run was repeated."""

TUNED_ON = 2
"""How many ranks have native's learning rate, whose losses do not depend on their number."""
PROBES: tuple[int, ...] = (8, 24)  # samples a rank takes at once; memory is about linear in them
_LOSS = "val_loss_at_"


@dataclass(frozen=True)
class Curve:
    """Held-out loss by optimizer step, ascending."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def smoothed(self, count: int = SMOOTHED) -> Curve:
        """Each loss a mean of so many, itself and those before it: one lucky evaluation reaches no target."""
        means = tuple(
            statistics.mean(self.losses[max(0, i + 1 - count) : i + 1]) for i in range(len(self.losses))
        )
        return Curve(self.steps, means)

    def at_target(self) -> float:
        """The loss after the part of a whole run that sets the target."""
        return [
            loss
            for step, loss in zip(self.steps, self.losses, strict=True)
            if LENGTH * step <= self.steps[-1]
        ][-1]

    def steps_to(self, target: float) -> float:
        """The step at which the loss first falls to the target, linear between evaluations; infinity if never."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return float(self.steps[0])
                share = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                return self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1])
        return math.inf


Key = tuple[str, str]
"""The size of a step, as cases name it, and the system."""


def target(found: Mapping[Key, Curve], factor: float) -> float:
    """So many times native's loss after a third of its run, with the size of its steps that is best."""
    return factor * min(curve.at_target() for (_, system), curve in found.items() if system == NATIVE)


def seconds_to(
    loss: float, found: Mapping[Key, Curve], seconds: Mapping[Key, float], systems: Sequence[str]
) -> float:
    """Until the first of these systems, with the size of steps that is best for it, is at the loss."""
    return min(
        (
            curve.steps_to(loss) * seconds[size, system]
            for (size, system), curve in found.items()
            if system in systems and (size, system) in seconds
        ),
        default=math.inf,
    )


def parted(case: str) -> tuple[str, str]:
    """(the case without the size of its steps, the size) of "MODEL on DATA, 128 a step, ..."."""
    words = case.split(", ")
    return ", ".join([words[0], *words[2:]]), words[1]


def curves(case: Case, ranks: int, seed: int, measured: Measured) -> dict[str, Curve]:
    """The smoothed curve of every system that has run with this seed, to the end."""
    title, found = f"{case.title(ranks)}, seed {seed}", {}
    for system in SYSTEMS:
        points = sorted(
            (int(metric.removeprefix(_LOSS)), values[-1])
            for (where, name, metric), values in measured.items()
            if (where, name) == (title, system) and metric.startswith(_LOSS)
        )
        last = case.steps
        points = [point for point in points if point[0] <= last]
        if points and points[-1][0] == last:
            found[system] = Curve(*(tuple(one) for one in zip(*points, strict=True))).smoothed()
    return found | {system: found[other] for system, other in CURVE_OF.items() if other in found}


def of_rounds(
    case: Case, ranks: int, rate: str, system: str, measured: Measured, metric: str = "step_seconds"
) -> float:
    """The median over rounds, of a step's mean seconds, say; nan without rounds."""
    start = f"{case.title(ranks)}, {rate}, round "
    found = [
        value
        for (where, name, what), values in measured.items()
        for value in values
        if where.startswith(start) and name == system and what == metric
    ]
    return statistics.median(found) if found else math.nan


def read_rows(path: Path | None) -> Measured:
    """All values of a file's rows by (case, system, metric), in their order."""
    measured: Measured = {}
    if path is not None and path.exists():
        for row in map(json.loads, path.read_text().splitlines()):
            if row["bench"] == BENCH and row["value"] is not None:
                measured.setdefault((row["case"], row["system"], row["metric"]), []).append(row["value"])
    return measured


def print_report(cases: Sequence[Case], ranks: int, rates: list[str], seeds: int, measured: Measured) -> None:
    """One table for the sizes of a case: what was measured, and for each link the seconds to a loss near native's."""
    by_seed: dict[int, dict[Key, Curve]] = {}
    for case in cases:
        size = parted(case.title(ranks))[1]
        for seed in range(seeds):
            for system, curve in curves(case, ranks, seed, measured).items():
                by_seed.setdefault(seed, {})[size, system] = curve
    whole = [found for found in by_seed.values() if any(system == NATIVE for _, system in found)]
    table = Table(
        title=parted(cases[0].title(ranks))[0],
        caption=f"losses are means of {SMOOTHED} evaluations; to target: {MIDDLE} x native's loss after "
        f"1/{LENGTH} of a run; vs DP, vs one: the better data-parallel one's seconds, those of one host, / these",
    )
    columns = [
        "size",
        "system",
        "rate",
        "loss",
        "steps to target",
        "MB/step",
    ]
    for rate in rates:
        columns += [f"ms/step, {rate}", "ranks", "s to target", "vs DP", "vs one"]
    for name in columns:
        table.add_column(name, justify="left" if name in ("size", "system") else "right")
    timed = {
        rate: {
            (parted(case.title(ranks))[1], system): of_rounds(case, ranks, rate, system, measured)
            for case in cases
            for system in SYSTEMS
        }
        for rate in rates
    }
    for case in cases:
        title, size = case.title(ranks), parted(case.title(ranks))[1]
        for system in SYSTEMS:
            own = [found[size, system] for found in whole if (size, system) in found]
            steps = [
                found[size, system].steps_to(target(found, MIDDLE))
                for found in whole
                if (size, system) in found
            ]

            def known(where: str, metric: str, system: str = system) -> float:
                return measured.get((where, system, metric), [math.nan])[-1]

            row = [
                size,
                system,
                _or_empty(_rate(case, ranks, system, measured), ".2g"),
                _or_empty(_mean([curve.losses[-1] for curve in own]), ".4f"),
                _or_empty(_mean(steps), ".0f"),
                _or_empty(known(f"{title}, seed 0", "nic_bytes_per_step") / 1e6, ".2f"),
            ]
            for rate in rates:
                taken = timed[rate][size, system] * _mean(steps)
                others = [
                    _mean([seconds_to(target(found, MIDDLE), found, timed[rate], of) for found in whole])
                    for of in (DATA_PARALLEL, [ALONE])
                ]
                row += [
                    _or_empty(timed[rate][size, system] * 1000, ".0f"),
                    _or_empty(of_rounds(case, ranks, rate, system, measured, "ranks_at_work"), ".0f"),
                    _or_empty(taken, ".1f"),
                    *(_or_empty(one / taken, ".2f") for one in others),
                ]
            table.add_row(*row)
    Console(width=max(230, Console().width)).print(table)


def print_memory(case: Case, ranks: int, cap_mib: int, measured: Measured) -> None:
    """A table of what each system needs, with and without checkpointing, and what fits."""
    title = case.title(ranks)
    table = Table(title=title, caption="MB: growth of the largest rank's process")
    for name in ("system", *(f"MB at batch {probe}" for probe in PROBES), f"batch in {cap_mib} MiB"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for system in (*SYSTEMS, *IN_LESS_MEMORY):
        found = [
            measured.get((title, system, f"memory_at_batch_{probe}"), [math.nan])[-1] for probe in PROBES
        ]
        largest = measured.get((title, system, f"largest_batch_in_{cap_mib}_MiB"), [math.nan])[-1]
        table.add_row(system, *(_or_empty(one / 1e6, ".0f") for one in found), _or_empty(largest, ".0f"))
    Console().print(table)


def _rate(case: Case, ranks: int, system: str, measured: Measured) -> float:
    system = RATE_OF.get(system, system)
    ranks = TUNED_ON if system == NATIVE else ranks
    return measured.get((f"{case.title(ranks)}, tuning", system, "learning_rate"), [math.nan])[-1]


def _mean(values: list[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _or_empty(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


# ------------------------------------------------------------ the claim (T5)
def verdict(rows: Rows) -> str:
    """Whether partition-wise training reaches a loss 1.3 times as soon as the better data-parallel system.

    Each with the size of steps that is best for it. The losses: native's after a third of its run with the same seed,
    and 2 and 5 % above it; at each of them the speed-up's 95 % interval must lie above what is asked. It is a bootstrap
    over seeds (steps to the loss) and rounds (seconds of a step on that link, of systems that took turns). Where that
    is so, but it may be slower than backprop on one host alone, which needs no ranks, a condition says so. Without
    conditions only where one system does so everywhere.
    """
    found: list[tuple[bool, str]] = []
    passing: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}  # by whether one host alone is slower
    places: list[str] = []
    for case, losses in _curves_by_case(rows).items():
        for rate, rounds in _rounds(rows, case).items():
            place = f"{rate} links, {case.rpartition(', ')[2]}, {case.split(' on ')[0]}{_heads(case)}"
            for system in (one for one in SYSTEMS if one not in (ALONE, *DATA_PARALLEL)):
                needed = {system, NATIVE, ALONE}
                seeds = [one for one in losses.values() if needed <= {name for _, name in one}]
                turns = [one for one in rounds if needed <= {name for _, name in one}]
                if not seeds or not turns:
                    continue
                decided = len(seeds) >= LEAST_SEEDS and len(turns) >= LEAST_ROUNDS
                text, lowest = f"{system}, {place}: ", dict[str, float]()
                for others, name in ((DATA_PARALLEL, "data-parallel"), ((ALONE,), "one host")):
                    speedups = [_speedup(seeds, turns, system, factor, others) for factor in TARGETS]
                    lowest[name] = min(low for _, low in speedups)
                    text += f"{span([mean for mean, _ in speedups], '.2f')} x as fast as {name}"
                    text += f", at least {lowest[name]:.2f} x" if decided else ""
                    text += "; " if others == DATA_PARALLEL else ""
                text += "" if decided else f" (seeds: {len(seeds)}, rounds: {len(turns)}: not decided)"
                found.append((not decided, text))
                if place not in places:
                    places.append(place)
                if decided and lowest["data-parallel"] >= FASTER:
                    passing[lowest["one host"] >= 1.0].setdefault(system, []).append(place)
    texts = "; ".join(text for _, text in sorted(found, key=lambda one: one[0]))
    beats_one = bool(passing[True])
    if not (best := passing[beats_one]):
        return says(None, texts or "no case has losses and times")
    everywhere = any(len(where) == len(places) for where in best.values())
    some = [f"{system} on {' and '.join(where)}" for system, where in best.items()]
    conditions = [] if everywhere else [f"it is {' or '.join(some)}"]
    alone = [] if beats_one else ["backprop on one host, which may be as fast, does not count"]
    return says([*conditions, *alone], texts)


def curves_and_rounds(
    rows: Rows,
) -> list[tuple[str, dict[int, dict[Key, Curve]], list[dict[Key, float]]]]:
    """Of every case and link that has both: its title, curves by seed, and the rounds' seconds of a step."""
    return [
        (f"{case.split(', ')[0]}{_heads(case)}, {case.rpartition(', ')[2]}, {rate}", losses, rounds)
        for case, losses in _curves_by_case(rows).items()
        for rate, rounds in _rounds(rows, case).items()
    ]


def _heads(case: str) -> str:
    """Of a case's title, for people."""
    return next(
        (f" with {part.split(' ')[1]} heads" for part in case.split(", ") if part.startswith("heads ")), ""
    )


def _curves_by_case(rows: Rows) -> dict[str, dict[int, dict[Key, Curve]]]:
    """{case without sizes: {seed: smoothed curves}}, of runs that reached the last step with finite losses."""
    points: dict[str, dict[int, dict[str, dict[int, float]]]] = {}
    for row in rows:
        case, comma, seed = str(row["case"]).rpartition(", seed ")
        if comma and str(row["metric"]).startswith(_LOSS):
            step = int(str(row["metric"]).removeprefix(_LOSS))
            of_seed = points.setdefault(case, {}).setdefault(int(seed), {})
            value = math.nan if row["value"] is None else float(row["value"])
            of_seed.setdefault(str(row["system"]), {})[step] = value
    found: dict[str, dict[int, dict[Key, Curve]]] = {}
    for case, of_case in points.items():
        family, size = parted(case)
        last: dict[str, int] = {}
        for of_seed in of_case.values():
            for system, losses in of_seed.items():
                last[system] = max(last.get(system, 0), *losses)
        for seed, of_seed in of_case.items():
            for system, losses in of_seed.items():
                if max(losses) == last[system] and all(map(math.isfinite, losses.values())):
                    steps = sorted(losses)
                    curve = Curve(tuple(steps), tuple(losses[step] for step in steps)).smoothed()
                    names = [system, *(one for one, other in CURVE_OF.items() if other == system)]
                    of_seed = found.setdefault(family, {}).setdefault(seed, {})
                    of_seed |= {(size, name): curve for name in names}
    return found


def _rounds(rows: Rows, case: str) -> dict[str, list[dict[Key, float]]]:
    """A step's seconds of each round of sizes and systems, by link; those of another call stay apart."""
    found: dict[str, dict[tuple[str, int], dict[Key, float]]] = {}
    for row in rows:
        where, comma, number = str(row["case"]).rpartition(", round ")
        if row["metric"] != "step_seconds" or not comma:
            continue
        title, _, rate = where.rpartition(", ")
        family, size = parted(title)
        if family == case:
            key, repeat = (size, str(row["system"])), 0
            rounds = found.setdefault(rate, {})
            while key in rounds.get((number, repeat), {}):
                repeat += 1
            rounds.setdefault((number, repeat), {})[key] = float(row["value"])
    return {rate: list(rounds.values()) for rate, rounds in found.items()}


def _speedup(
    seeds: list[dict[Key, Curve]],
    rounds: list[dict[Key, float]],
    system: str,
    factor: float,
    others: Sequence[str],
) -> tuple[float, float]:
    """(median, lower end of the 95 % interval): the best other system's seconds / this one's; 0: not reached.

    Each seed is paired with each round; drawn with replacement are seeds and rounds.
    """

    def ratio(found: dict[Key, Curve], seconds: dict[Key, float]) -> float:
        loss = target(found, factor)
        return seconds_to(loss, found, seconds, others) / seconds_to(loss, found, seconds, [system])

    table = np.array([[ratio(found, seconds) for seconds in rounds] for found in seeds])
    rng = np.random.default_rng(0)
    draws = [
        np.median(
            table[rng.integers(len(seeds), size=len(seeds))][:, rng.integers(len(rounds), size=len(rounds))]
        )
        for _ in range(DRAWS)
    ]
    return float(np.median(table)), float(np.quantile(draws, 0.025))
