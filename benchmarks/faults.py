"""What `edl train` does when something fails: real faults in real jobs on emulated hosts.

python -m benchmarks.faults --launcher torchrun --out benchmarks/results/faults.jsonl     # or slurm, mpirun
python -m benchmarks.faults --launcher slurm --cases node-down,link-cut                    # --list: their names
python -m benchmarks.faults --table                                                        # from the committed rows

Every job trains the same small model on two emulated hosts (Slurm has a third one to spare), with a checkpoint every
ten steps, and is compared with a run that nothing has disturbed: the weights at the end, bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.fault_behaviour import STEPS, Outcome, train_words
from benchmarks.fault_cases import LAUNCHERS, Case
from benchmarks.fault_table import place, read, short_table, table
from benchmarks.rows import Row, RowFile
from cluster.errors import EmulationError
from efficient_dl.training.checkpoint import CheckpointFolder

BENCH = "faults"
REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "faults.jsonl"
DOCUMENT, README = REPOSITORY / "docs" / "faults.md", REPOSITORY / "README.md"
_TRAIN_SECONDS = 900.0  # of the undisturbed run, which takes ten on a machine that does nothing else
_TIDY_SECONDS = 5.0  # multiprocessing's own tracker ends when its pipe closes


@dataclass(frozen=True)
class Measured:
    """A case, what came of it, and whether the weights at the end are those of the undisturbed run."""

    case: Case
    outcome: Outcome
    is_equal: bool | None  # None: the run did not end
    left: int  # processes on the hosts afterwards


def undisturbed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights and the optimizer's state of two workers on one host after all steps, trained unless there."""
    out = folder / "undisturbed"
    if CheckpointFolder(out / "checkpoints").latest() == STEPS:
        return final(out)
    command = [sys.executable, "-m", "efficient_dl.cli", *train_words(out), "--workers", "2"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=_TRAIN_SECONDS)
    return final(out)


def final(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint."""
    return CheckpointFolder(out / "checkpoints").load(STEPS).tensors


def measure(case: Case, folder: Path, reference: dict[str, torch.Tensor], launcher: str) -> Measured:
    """Runs one case on hosts of its own. Raises EmulationError if it does not come to its end in time."""
    folder.mkdir(parents=True)
    with case.job(LAUNCHERS[launcher][0], folder) as job:
        outcome = case.run(job, folder / "run")
        deadline = time.monotonic() + _TIDY_SECONDS
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


def rows(one: Measured, launcher: str) -> Iterator[Row]:
    """What is known of a case, a metric each."""
    title = f"{one.case.title}: {one.outcome.behaviour}"
    for metric, value, unit, higher in (
        ("seconds_to_recover", one.outcome.recovery_seconds, "s", False),
        ("seconds_to_end", one.outcome.end_seconds, "s", False),
        ("lost_steps", one.outcome.lost_steps, "steps", False),
        ("processes_left", one.left, "processes", False),
        ("same_weights", one.is_equal, "1: bit for bit", True),
    ):
        if value is not None:
            yield Row(BENCH, title, launcher, metric, float(value), unit, higher)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    launcher: Annotated[
        str, typer.Option(help="what starts the ranks: torchrun, slurm, mpirun")
    ] = "torchrun",
    cases: Annotated[str, typer.Option(help="names, with commas between them; all if empty")] = "",
    reference: Annotated[
        Path | None, typer.Option(help="a folder to keep the undisturbed run in, for other calls")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="only print the cases' names")] = False,
    table_: Annotated[
        bool, typer.Option("--table", help="measure nothing: put the committed rows into docs and README")
    ] = False,
    quick: Annotated[bool, typer.Option(help="two cases")] = False,
) -> None:
    """Inject faults into running jobs, and report what came of them."""
    if launcher not in LAUNCHERS:
        raise typer.BadParameter(f"no launcher {launcher!r} here; there are {', '.join(LAUNCHERS)}")
    known = LAUNCHERS[launcher][1]
    if list_:
        print("\n".join(known))
        return
    if table_:
        seen = read(RESULTS)
        for file, content in ((DOCUMENT, table(seen)), (README, short_table(seen))):
            file.write_text(place(file.read_text(), content))
            print(f"{content}\n")
        return
    names = cases.split(",") if cases else (["worker-killed", "link-cut-5-s"] if quick else list(known))
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no case {unknown[0]}; there are {', '.join(known)}")
    file, failed = RowFile(out), list[str]()
    with tempfile.TemporaryDirectory(prefix="edl-faults-") as temporary:
        folder = Path(temporary)
        expected = undisturbed(reference or folder)
        for name in names:
            begin = time.monotonic()
            try:
                one = measure(known[name], folder / name, expected, launcher)
            except EmulationError as error:
                # A promise is not kept: the other cases are worth knowing all the same.
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            for row in rows(one, launcher):
                file.add(row)
            if one.left or (known[name].is_exact and one.is_equal is False):
                failed.append(name)
            equal = {None: "no end", True: "same weights", False: "other weights"}[one.is_equal]
            print(
                f"{name} ({time.monotonic() - begin:.0f} s): {one.outcome}, {equal}, {one.left} left",
                flush=True,
            )
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
