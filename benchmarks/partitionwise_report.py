"""Composes what benchmarks.partitionwise has measured: seconds to a loss = steps to it x seconds of a step."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.partitionwise_runs import DATA_PARALLEL, NATIVE, SYSTEMS, Case
from benchmarks.verdicts import Rows, says, span

BENCH = "partitionwise"
FASTER = 1.3  # what the claim's verdict asks for
LEAST_SEEDS, LEAST_ROUNDS = 3, 3
SMOOTHED = 5  # evaluations
TARGETS = (1.0, 1.02, 1.05)  # of native's last loss
MIDDLE = 1.02  # the one that tables show
DRAWS = 2000  # of the bootstrap
Measured = dict[tuple[str, str, str], list[float]]
"""Values by (case, system, metric); several where a run was repeated."""

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

    def steps_to(self, target: float) -> float:
        """The step at which the loss first falls to the target, linear between evaluations; infinity if never."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return float(self.steps[0])
                share = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                return self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1])
        return math.inf


def targets(native: Curve) -> dict[float, float]:
    """By how much above native's last loss, as a factor: the losses at which systems are compared."""
    return {factor: native.losses[-1] * factor for factor in TARGETS}


def seconds_to(target: float, curve: Curve, seconds: float) -> float:
    """Until a loss, with steps of so many seconds."""
    return curve.steps_to(target) * seconds


def curves(case: Case, ranks: int, seed: int, measured: Measured) -> dict[str, Curve]:
    """The smoothed curve of every system that has run with this seed, to the end."""
    title, found = f"{case.title(ranks)}, seed {seed}", {}
    for system in SYSTEMS:
        points = sorted(
            (int(metric.removeprefix(_LOSS)), values[-1])
            for (where, name, metric), values in measured.items()
            if (where, name) == (title, system) and metric.startswith(_LOSS)
        )
        points = [point for point in points if point[0] <= case.steps]
        if points and points[-1][0] == case.steps:
            found[system] = Curve(*(tuple(one) for one in zip(*points, strict=True))).smoothed()
    return found


def step_seconds(case: Case, ranks: int, rate: str, system: str, measured: Measured) -> float:
    """The median over rounds of a step's mean seconds; nan without rounds."""
    start = f"{case.title(ranks)}, {rate}, round "
    found = [
        value
        for (where, name, metric), values in measured.items()
        for value in values
        if where.startswith(start) and name == system and metric == "step_seconds"
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


def print_report(
    case: Case, ranks: int, rates: list[str], seeds: int, cap_mib: int, measured: Measured
) -> None:
    """One table: what was measured, and for each rate the seconds to the lowest loss that all systems reach."""
    by_seed = {seed: found for seed in range(seeds) if (found := curves(case, ranks, seed, measured))}
    table = Table(
        title=case.title(ranks),
        caption=f"losses are means of {SMOOTHED} evaluations; to target: {MIDDLE} x native's last loss of that seed; "
        "against: the better data-parallel one's seconds / these; MB: growth of the largest rank",
    )
    columns = [
        "system",
        "loss",
        "steps to target",
        "MB/step",
        f"MB at batch {PROBES[0]}",
        f"batch in {cap_mib} MiB",
    ]
    for rate in rates:
        columns += [f"ms/step, {rate}", "s to target", "against"]
    for name in columns:
        table.add_column(name, justify="left" if name == "system" else "right")
    steps = {
        system: statistics.mean(
            found[system].steps_to(MIDDLE * found[NATIVE].losses[-1])
            for found in by_seed.values()
            if system in found and NATIVE in found
        )
        for system in SYSTEMS
        if any(system in found and NATIVE in found for found in by_seed.values())
    }
    seconds = {
        (rate, system): step_seconds(case, ranks, rate, system, measured)
        for rate in rates
        for system in SYSTEMS
    }
    for system in SYSTEMS:

        def of_seeds(metric: str, system: str = system) -> list[float]:
            keys = ((f"{case.title(ranks)}, seed {seed}", system, metric) for seed in range(seeds))
            return [measured[key][-1] for key in keys if key in measured]

        def cell(values: list[float], form: str, scale: float = 1.0) -> str:
            return format(statistics.mean(values) * scale, form) if values else ""

        def known(metric: str, system: str = system) -> list[float]:
            return measured.get((case.title(ranks), system, metric), [])[-1:]

        row = [
            system,
            cell([found[system].losses[-1] for found in by_seed.values() if system in found], ".4f"),
            _or_empty(steps.get(system, math.nan), ".0f"),
            cell(of_seeds("nic_bytes_per_step"), ".2f", 1e-6),
            cell(known(f"memory_at_batch_{PROBES[0]}"), ".0f", 1e-6),
            cell(known(f"largest_batch_in_{cap_mib}_MiB"), ".0f"),
        ]
        for rate in rates:
            taken = seconds[rate, system] * steps.get(system, math.nan)
            best = min(
                (seconds[rate, one] * steps[one] for one in DATA_PARALLEL if one in steps), default=math.nan
            )
            row += [
                _or_empty(seconds[rate, system] * 1000, ".0f"),
                _or_empty(taken, ".1f"),
                _or_empty(best / taken, ".2f"),
            ]
        table.add_row(*row)
    Console(width=max(180, Console().width)).print(table)


def _or_empty(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


# ------------------------------------------------------------ the claim (T5)
def verdict(rows: Rows) -> str:
    """Whether partition-wise training reaches a loss 1.3 times as soon as the better data-parallel system.

    The losses: native's last one of the same seed, and 2 and 5 % above it; at each of them the speed-up's 95 % interval
    must lie above what is asked. It is a bootstrap over seeds (steps to the loss) and rounds (seconds of a step on that
    link, of systems that took turns). Without conditions only where one system does so everywhere.
    """
    found: list[tuple[bool, str]] = []
    passing: dict[str, list[str]] = {}
    places: list[str] = []
    for case, losses in _curves_by_case(rows).items():
        for rate in _rates(rows, case):
            place = f"{rate} links, {case.rpartition(', ')[2]}, {case.split(' on ')[0]}"
            rounds = _rounds(rows, case, rate)
            for system in (one for one in SYSTEMS if one not in DATA_PARALLEL):
                seeds = [one for one in losses.values() if system in one and NATIVE in one]
                turns = [one for one in rounds if system in one and NATIVE in one]
                if not seeds or not turns:
                    continue
                speedups = [_speedup(seeds, turns, system, factor) for factor in TARGETS]
                decided = len(seeds) >= LEAST_SEEDS and len(turns) >= LEAST_ROUNDS
                means = span([mean for mean, _ in speedups], ".2f")
                lower = min(low for _, low in speedups)
                found.append(
                    (
                        not decided,
                        f"{system}, {place}: {means} x as fast"
                        + (
                            f", at least {lower:.2f} x"
                            if decided
                            else f" (seeds: {len(seeds)}, rounds: {len(turns)}: not decided)"
                        ),
                    )
                )
                if place not in places:
                    places.append(place)
                if decided and lower >= FASTER:
                    passing.setdefault(system, []).append(place)
    texts = "; ".join(text for _, text in sorted(found, key=lambda one: one[0]))
    if not passing:
        return says(None, texts or "no case has losses and times")
    everywhere = any(len(where) == len(places) for where in passing.values())
    some = [f"{system} on {' and '.join(where)}" for system, where in passing.items()]
    return says([] if everywhere else [f"it is {' or '.join(some)}"], texts)


def _curves_by_case(rows: Rows) -> dict[str, dict[int, dict[str, Curve]]]:
    """{case: {seed: {system: its smoothed curve}}}, of runs that reached the case's last step with finite losses."""
    points: dict[str, dict[int, dict[str, dict[int, float]]]] = {}
    for row in rows:
        case, comma, seed = str(row["case"]).rpartition(", seed ")
        if comma and str(row["metric"]).startswith(_LOSS):
            step = int(str(row["metric"]).removeprefix(_LOSS))
            of_seed = points.setdefault(case, {}).setdefault(int(seed), {})
            value = math.nan if row["value"] is None else float(row["value"])
            of_seed.setdefault(str(row["system"]), {})[step] = value
    found: dict[str, dict[int, dict[str, Curve]]] = {}
    for case, of_case in points.items():
        last = max(max(losses) for of_seed in of_case.values() for losses in of_seed.values())
        for seed, of_seed in of_case.items():
            for system, losses in of_seed.items():
                if max(losses) == last and all(map(math.isfinite, losses.values())):
                    steps = sorted(losses)
                    curve = Curve(tuple(steps), tuple(losses[step] for step in steps)).smoothed()
                    found.setdefault(case, {}).setdefault(seed, {})[system] = curve
    return found


def _rates(rows: Rows, case: str) -> list[str]:
    """The links on which steps of this case were timed."""
    timed = (str(row["case"]) for row in rows if row["metric"] == "step_seconds")
    places = (one.removeprefix(case + ", ").split(", ")[0] for one in timed if one.startswith(case + ", "))
    return list(dict.fromkeys(places))


def _rounds(rows: Rows, case: str, rate: str) -> list[dict[str, float]]:
    """A step's seconds by system, of each round in which the systems took turns; rounds of several calls stay apart."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        where = str(row["case"])
        if row["metric"] == "step_seconds" and where.startswith(f"{case}, {rate}, round "):
            system, repeat = str(row["system"]), 0
            while system in found.get((where, repeat), {}):
                repeat += 1
            found.setdefault((where, repeat), {})[system] = float(row["value"])
    return list(found.values())


def _speedup(
    seeds: list[dict[str, Curve]], rounds: list[dict[str, float]], system: str, factor: float
) -> tuple[float, float]:
    """(median, lower end of the 95 % interval): the better data-parallel system's seconds / this one's; 0: not reached.

    Each seed is paired with each round; drawn with replacement are seeds and rounds.
    """

    def ratio(found: dict[str, Curve], seconds: dict[str, float]) -> float:
        target = targets(found[NATIVE])[factor]
        best = min(
            seconds_to(target, found[one], seconds[one])
            for one in DATA_PARALLEL
            if one in found and one in seconds
        )
        return best / seconds_to(target, found[system], seconds[system])

    table = np.array([[ratio(found, seconds) for seconds in rounds] for found in seeds])
    rng = np.random.default_rng(0)
    draws = [
        float(
            np.median(
                table[rng.integers(len(seeds), size=len(seeds))][
                    :, rng.integers(len(rounds), size=len(rounds))
                ]
            )
        )
        for _ in range(DRAWS)
    ]
    return float(np.median(table)), float(np.quantile(draws, 0.025))
