"""Composes what benchmarks.partitionwise has measured: seconds to a loss = steps to it x seconds of a step."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.pairs import mean_interval
from benchmarks.partitionwise_runs import DATA_PARALLEL, SYSTEMS, Case
from benchmarks.verdicts import Rows, interval_text, says

BENCH = "partitionwise"
FASTER = 1.3  # what the claim's verdict asks for
Measured = dict[tuple[str, str, str], list[float]]
"""Values by (case, system, metric); several where a run was repeated."""

PROBES: tuple[int, ...] = (8, 24)  # samples a rank takes at once; memory is about linear in them
_LOSS = "val_loss_at_"


@dataclass(frozen=True)
class Curve:
    """Held-out loss by optimizer step, ascending."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def steps_to(self, target: float) -> float:
        """The step at which the loss first falls to the target, linear between evaluations; infinity if never."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return float(self.steps[0])
                share = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                return self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1])
        return math.inf


def curves(case: Case, ranks: int, seed: int, measured: Measured) -> dict[str, Curve]:
    """The curve of every system that has run with this seed."""
    title, found = f"{case.title(ranks)}, seed {seed}", {}
    for system in SYSTEMS:
        points = sorted(
            (int(metric.removeprefix(_LOSS)), values[-1])
            for (where, name, metric), values in measured.items()
            if (where, name) == (title, system) and metric.startswith(_LOSS)
        )
        points = [point for point in points if point[0] <= case.steps]
        if points and points[-1][0] == case.steps:
            found[system] = Curve(*(tuple(one) for one in zip(*points, strict=True)))
    return found


def common_target(found: dict[str, Curve]) -> float:
    """The lowest loss that all systems reach."""
    return max(min(curve.losses) for curve in found.values())


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
        caption="to target: the lowest loss that all systems reach with that seed; against: the better data-parallel "
        "one's seconds / these; MB: growth of the largest rank",
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
            found[system].steps_to(common_target(found)) for found in by_seed.values() if system in found
        )
        for system in SYSTEMS
        if any(system in found for found in by_seed.values())
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
            f"{steps[system]:.0f}" if system in steps else "",
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
    """Whether partition-wise training is at the common loss 1.3 times as soon as the better data-parallel system.

    Seconds to it are steps to the lowest loss that all systems reach with a seed, times the median seconds of a step
    on that link. The mean speed-up's 95 % interval over seeds must lie above what is asked: one seed decides nothing.
    """
    found: list[tuple[float, str]] = []
    slow_links: dict[str, None] = {}  # where it is faster
    all_links: dict[str, None] = {}
    for case, losses in _curves_by_case(rows).items():
        for rate in _rates(rows, case):
            seconds = {system: _median_seconds(rows, case, rate, system) for system in SYSTEMS}
            link = f"{rate} links for {case.split(' on ')[0]}"
            for system in (one for one in SYSTEMS if one not in DATA_PARALLEL):
                speedups = [
                    _speedup(curves, seconds, system)
                    for curves in losses.values()
                    if system in curves and all(one in curves for one in DATA_PARALLEL)
                ]
                if not speedups or not math.isfinite(seconds[system]):
                    continue
                mean, half = mean_interval(speedups)
                seeds = f"seeds: {len(speedups)}" if len(speedups) > 1 else "one seed: not decided"
                text = f"{system}, {link}: {interval_text(mean, half, '.2f')} x as fast, {seeds}"
                found.append((mean, text))
                all_links[link] = None
                if len(speedups) > 1 and mean - half >= FASTER:
                    slow_links[link] = None
    texts = "; ".join(text for _, text in sorted(found, reverse=True)) or "no case has losses and times"
    if not slow_links:
        return says(None, texts)
    conditions = [] if slow_links == all_links else [f"it is on {' or '.join(slow_links)}"]
    return says(conditions, texts)


def _curves_by_case(rows: Rows) -> dict[str, dict[int, dict[str, Curve]]]:
    """{case: {seed: {system: its curve}}}."""
    points: dict[str, dict[int, dict[str, dict[int, float]]]] = {}
    for row in rows:
        case, comma, seed = str(row["case"]).rpartition(", seed ")
        if comma and str(row["metric"]).startswith(_LOSS) and row["value"] is not None:
            step = int(str(row["metric"]).removeprefix(_LOSS))
            of_seed = points.setdefault(case, {}).setdefault(int(seed), {})
            of_seed.setdefault(str(row["system"]), {})[step] = float(row["value"])
    return {
        case: {
            seed: {
                system: Curve(tuple(sorted(losses)), tuple(losses[step] for step in sorted(losses)))
                for system, losses in of_seed.items()
            }
            for seed, of_seed in of_case.items()
        }
        for case, of_case in points.items()
    }


def _rates(rows: Rows, case: str) -> list[str]:
    """The links on which steps of this case were timed."""
    timed = (str(row["case"]) for row in rows if row["metric"] == "step_seconds")
    places = (one.removeprefix(case + ", ").split(", ")[0] for one in timed if one.startswith(case + ", "))
    return list(dict.fromkeys(places))


def _median_seconds(rows: Rows, case: str, rate: str, system: str) -> float:
    found = [
        float(row["value"])
        for row in rows
        if row["metric"] == "step_seconds"
        and row["system"] == system
        and str(row["case"]).startswith(f"{case}, {rate}, ")
    ]
    return statistics.median(found) if found else math.nan


def _speedup(found: dict[str, Curve], seconds: dict[str, float], system: str) -> float:
    """The better data-parallel system's seconds to the common loss / this one's."""
    target = common_target(found)
    best = min(found[one].steps_to(target) * seconds[one] for one in DATA_PARALLEL)
    return best / (found[system].steps_to(target) * seconds[system])
