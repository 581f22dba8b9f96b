"""What `edl train` does when something fails: real faults in real jobs on emulated hosts.

python -m benchmarks.faults --launcher torchrun --out benchmarks/results/faults.jsonl
python -m benchmarks.faults --only worker-killed --only link-cut-5-s

Every job trains the same small model on two emulated hosts, with a checkpoint every ten steps, and is compared with a
run that nothing has disturbed: the weights at the end, bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.fault_cases import CASES, STEPS, Case, Outcome, train_words
from benchmarks.rows import Row, RowFile
from cluster.emulate import EmulatedNetwork, EmulationError
from efficient_dl.training.checkpoint import CheckpointFolder

BENCH = "faults"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Measured:
    """A case, what came of it, and whether the weights at the end are those of the undisturbed run."""

    case: Case
    outcome: Outcome
    is_equal: bool | None  # None: the run did not end
    left: int  # processes on the hosts afterwards


def undisturbed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights and the optimizer's state after all steps, of two workers on one host."""
    out = folder / "undisturbed"
    command = [sys.executable, "-m", "efficient_dl.cli", *train_words(out), "--workers", "2"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=300)
    return final(out)


def final(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint."""
    return CheckpointFolder(out / "checkpoints").load(STEPS).tensors


def measure(case: Case, folder: Path, reference: dict[str, torch.Tensor]) -> Measured:
    """Runs one case on two hosts of its own. Raises EmulationError if it does not come to its end in time."""
    folder.mkdir(parents=True)
    with EmulatedNetwork(hosts=2, rate="1gbit") as network, case.job(network, folder) as job:
        outcome = case.run(job, folder / "run")
        deadline = time.monotonic() + 5.0  # multiprocessing's own tracker ends when its pipe closes
        while job.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = len(job.left())
    equal = None
    if CheckpointFolder(folder / "run" / "checkpoints").latest() == STEPS:
        tensors = final(folder / "run")
        equal = tensors.keys() == reference.keys() and all(
            torch.equal(value, reference[name]) for name, value in tensors.items()
        )
    return Measured(case, outcome, equal, left)


def table(found: list[Measured], launcher: str) -> str:
    """The cases as a table in Markdown."""
    lines = [
        "| fault | launcher | behaviour | seconds to recover | lost steps | same weights at the end |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        seconds = "" if one.outcome.recovery_seconds is None else f"{one.outcome.recovery_seconds:.1f}"
        lost = "" if one.outcome.lost_steps is None else str(one.outcome.lost_steps)
        other = "NO" if one.case.is_exact else "one worker instead of two"
        equal = {None: "did not end", True: "bit for bit", False: other}[one.is_equal]
        lines.append(
            f"| {one.case.title} | {launcher} | {one.outcome.behaviour} | {seconds} | {lost} | {equal} |"
        )
    return "\n".join(lines)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    launcher: Annotated[str, typer.Option(help="what starts the workers: torchrun")] = "torchrun",
    only: Annotated[list[str] | None, typer.Option(help="a case by its name; repeatable")] = None,
    quick: Annotated[bool, typer.Option(help="two cases")] = False,
) -> None:
    """Inject faults into running jobs, and report what came of them."""
    if launcher != "torchrun":
        raise typer.BadParameter(f"no launcher {launcher!r} here; there is torchrun")
    names = only or (["worker-killed", "link-cut-5-s"] if quick else list(CASES))
    if unknown := [name for name in names if name not in CASES]:
        raise typer.BadParameter(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    file, found, failed = RowFile(out), list[Measured](), list[str]()
    with tempfile.TemporaryDirectory(prefix="edl-faults-") as temporary:
        folder = Path(temporary)
        reference = undisturbed(folder)
        for name in names:
            try:
                one = measure(CASES[name], folder / name, reference)
            except (
                EmulationError
            ) as error:  # a promise is not kept: the other cases are worth knowing all the same
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            found.append(one)
            print(table([one], launcher).splitlines()[-1], flush=True)
            for metric, value, unit, higher in (
                ("seconds_to_recover", one.outcome.recovery_seconds, "s", False),
                ("lost_steps", one.outcome.lost_steps, "steps", False),
                ("processes_left", one.left, "processes", False),
                ("same_weights", one.is_equal, "1: bit for bit", True),
            ):
                if value is not None:
                    file.add(
                        Row(
                            BENCH,
                            f"{one.case.title}: {one.outcome.behaviour}",
                            launcher,
                            metric,
                            float(value),
                            unit,
                            higher,
                        )
                    )
    Console(width=200).print(table(found, launcher), markup=False)
    broken = [one.case.title for one in found if one.left or (one.case.is_exact and one.is_equal is False)]
    if failed or broken:
        print(f"failed: {', '.join(failed + broken)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
