"""Does depth regularize, and can balanced factors or their preconditioner do the same for networks trained locally?

python -m benchmarks.depth --out benchmarks/results/depth.jsonl                            # minutes on one core
python -m benchmarks.depth --quick                                                         # under a minute
First low-rank matrices are completed from a part of their entries. Then perceptrons learn images from few, some and
all rows, by backprop and block by block (each block a loss of its own, no gradient between blocks), with each
regularizer. Learning rates and strengths are chosen by validation rows, on seeds that the comparison does not use. The
last line is the verdict, computed from the rows.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.depth_completion import CASE, completion_rows
from benchmarks.depth_images import BACKPROP, LOCAL, image_rows
from benchmarks.rows import RowFile
from benchmarks.studies import StudyRow, as_dicts, cases_of, listed, paired, seeds_of, systems_of
from benchmarks.verdicts import says

Rows = list[dict[str, Any]] | list[StudyRow]


def run_study(*, quick: bool, seeds: int = 5, file: RowFile | None = None) -> list[dict[str, Any]]:
    """All rows. quick: small matrices, two sizes of digits, fewer regularizers, 3 seeds."""
    torch.set_num_threads(1)
    file = file or RowFile(None)
    start = len(file.rows)
    seeds = min(seeds, 3) if quick else seeds
    for row in completion_rows(quick, seeds):
        file.add(row)
    for row in image_rows(quick, seeds):
        file.add(row)
    return as_dicts(file.rows[start:])


def verdict(rows: Rows) -> str:
    """One sentence, computed from the rows: recovery first, then the gap between local training and backprop."""
    errors = {one: seeds_of(rows, CASE, one, "test_error") for one in systems_of(rows, CASE)}
    plain = errors["1 factor"]
    better = [one for one, values in errors.items() if _of_claim(one) and paired(values, plain).below]
    recovery = f"low-rank recovery is better than one factor's with {listed(better)}"
    closed: list[str] = []
    gaps: list[str] = []
    open_cases: list[str] = []  # with a gap that neither factors nor preconditioner close
    closed_cases: list[str] = []
    for case in cases_of(rows):
        if case == CASE:
            continue
        accuracy = {one: seeds_of(rows, case, one, "test_accuracy") for one in systems_of(rows, case)}
        gap = paired(accuracy[BACKPROP], accuracy[LOCAL])
        if not gap.above:
            continue
        gaps.append(f"{case} ({gap.mean:.1f} points)")
        closed_by_claim = False
        for system, values in accuracy.items():
            gain = paired(values, accuracy[LOCAL]) if system.startswith(f"{LOCAL} + ") else None
            if gain is not None and gain.above and gain.mean >= 0.5 * gap.mean:
                closed.append(f"{system.removeprefix(f'{LOCAL} + ')} on {case} ({gain.mean / gap.mean:.0%})")
                closed_by_claim = closed_by_claim or _of_claim(system.removeprefix(f"{LOCAL} + "))
        (closed_cases if closed_by_claim else open_cases).append(case)
    on_recovery = ["the task is low-rank recovery"] if better else None
    if not gaps:
        return says(
            on_recovery,
            f"{recovery}; closing half of the gap cannot be tested here, local training has none, p < .05",
        )
    if not closed:
        return says(on_recovery, f"{recovery}; nothing closes half of the gap, on {listed(gaps)}")
    found = f"{recovery}; half of the gap on {listed(gaps)} is closed by {listed(closed)}"
    if not closed_cases:
        return says(on_recovery, f"{found}; neither factors nor preconditioner are among them")
    if better and not open_cases:
        return says([], found)
    tasks = [*(["low-rank recovery"] if better else []), *closed_cases]
    return says([f"the task is {' or '.join(tasks)}"], found)


def _of_claim(name: str) -> bool:
    """Whether a system is the claim's: balanced factors or their preconditioner, no other optimizer or penalty."""
    return re.fullmatch(r"([2-9] factors|(factors|preconditioner), n = \d+)", name) is not None


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    quick: Annotated[bool, typer.Option(help="small matrices, two sizes of digits, 3 seeds")] = False,
) -> None:
    """Complete matrices, train networks, compare."""
    rows = run_study(quick=quick, seeds=seeds, file=RowFile(out))
    table = Table("data", "system", "test", "− local, points", "training − test", "effective rank", "rate")
    for case in cases_of(rows):
        local = seeds_of(rows, case, LOCAL, "test_accuracy")
        for system in systems_of(rows, case):
            ranks = seeds_of(rows, case, system, "effective_rank")
            rates = seeds_of(rows, case, system, "learning_rate")
            test = seeds_of(rows, case, system, "test_accuracy" if local else "test_error")
            gap = seeds_of(rows, case, system, "generalization_gap")
            gain = paired(test, local) if local and system != LOCAL else None
            table.add_row(
                case,
                system,
                f"{statistics.mean(test.values()):.2f} %" if test else "no finite result",
                f"{gain.mean:+.2f} ± {gain.half_width:.2f}" if gain else "",
                f"{statistics.mean(gap.values()):.2f}" if gap else "",
                f"{statistics.mean(ranks.values()):.1f}" if ranks else "",
                f"{next(iter(rates.values())):g}" if rates else "",
            )
    Console(width=130).print(table)
    print(verdict(rows))


if __name__ == "__main__":
    typer.run(main)
