"""Runs the studies of the thesis's claims and builds a page of what they say: behind `edl reproduce`.

python -m benchmarks.reproduce all --quick --out runs/reproduce       # as edl reproduce all --quick
Each study runs in a process of its own: what fails, is killed or takes too long is reported, and loses nothing else.
The page is written again after every study, so an interrupted command leaves what it had.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from benchmarks.claims import CLAIMS, Claim, NotHere
from benchmarks.reproduce_page import markdown, write_page

ALL = "all"
ROWS, PICTURE, PAGE, TABLE = "rows.jsonl", "plot.svg", "index.html", "table.md"
LIMIT_SECONDS = {True: 1800.0, False: 36 * 3600.0}  # of one study, quick or not; quick ones take two minutes
_HEARD_SECONDS, _ENDING_SECONDS = 10.0, 30.0
_ROOT = Path(__file__).parent.parent


@dataclass
class Outcome:
    """One claim's result. verdict: "" where there is none, and then error says why. source: where the rows are from."""

    claim: Claim
    source: str
    verdict: str = ""
    error: str = ""
    seconds: float = 0.0
    num_rows: int = 0
    machines: list[str] = field(default_factory=list)
    picture: Path | None = None
    rows: Path | None = None


def reproduce(keys: Sequence[str], out: Path, *, quick: bool, from_results: bool) -> list[Outcome]:
    """Runs (or, from_results, reads) the studies in turn; `out` gets a folder for each, a page and a table."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for number, key in enumerate(keys, start=1):
        claim = CLAIMS[key]
        print(f"{key} ({number} of {len(keys)}), {claim.title}: {claim.module}", flush=True)
        began = time.monotonic()
        outcome = Outcome(
            claim, "committed rows" if from_results else "run quick" if quick else "run in full"
        )
        try:
            _settle(outcome, out / key, quick, from_results)
        except NotHere as missing:
            outcome.error = str(missing)
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - began
        outcomes.append(outcome)
        write_page(outcomes, out / PAGE)
        write_page([outcome], out / key / PAGE)
        (out / TABLE).write_text(markdown(outcomes))
        print(f"{key}: {outcome.verdict or 'FAILED: ' + outcome.error} ({outcome.seconds:.0f} s)", flush=True)
    return outcomes


def _settle(outcome: Outcome, folder: Path, quick: bool, from_results: bool) -> None:
    """Rows, verdict and picture of one claim. Raises NotHere, and whatever a study or a plot raises."""
    folder.mkdir(parents=True, exist_ok=True)
    rows_file, picture = folder / ROWS, folder / PICTURE
    for stale in (rows_file, picture):
        stale.unlink(missing_ok=True)
    study = outcome.claim.study()
    if from_results:
        rows = outcome.claim.committed_rows()
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        _run(outcome.claim, rows_file, quick)
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    outcome.rows, outcome.num_rows = rows_file, len(rows)
    outcome.machines = _machines(rows)
    outcome.verdict = study.verdict(rows)
    importlib.import_module(outcome.claim.plot).main(rows_file, picture)
    outcome.picture = picture


def _run(claim: Claim, rows_file: Path, quick: bool) -> None:
    """The study in a process of its own. Raises RuntimeError where it fails or takes too long."""
    command = [sys.executable, "-m", "benchmarks.reproduce", "--study", claim.key, "--rows", str(rows_file)]
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [*command, *(["--quick"] if quick else [])],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        code = process.wait(LIMIT_SECONDS[quick])
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the study took more than {LIMIT_SECONDS[quick]:.0f} s and was ended") from None
    finally:
        _end(process)
        signal.signal(signal.SIGTERM, before)
    if code != 0:
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise RuntimeError(f"the study ended with {reason}; what it printed above says why")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing, if it has ended. Else time to answer the interrupt that a terminal sent it, too; then one from here.

    Then SIGTERM; killed it is only when that does not help: a study takes its emulated networks down when it is told.
    """
    steps = (
        (signal.SIGINT, _HEARD_SECONDS),
        (signal.SIGTERM, _ENDING_SECONDS),
        (signal.SIGKILL, _ENDING_SECONDS),
    )
    for number, patience in steps:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
        process.send_signal(number)
    process.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    """End by SIGTERM in an orderly way: with the study's process ended, too."""
    raise SystemExit(128 + number)


def _machines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows were measured on, and with which commit."""
    found = {
        f"{env.get('processor', '?')}, {env.get('cores', '?')} cores, torch {env.get('torch', '?')}, "
        f"commit {env.get('commit', '?')}, {env.get('date', '?')}"
        for row in rows
        if isinstance(env := row.get("env"), dict)
    }
    return sorted(found)


def main(
    claim: Annotated[str, typer.Argument(help=", ".join((*CLAIMS, ALL)))] = ALL,
    out: Annotated[Path, typer.Option(help="folder of rows, pictures and pages")] = Path("runs/reproduce"),
    quick: Annotated[bool, typer.Option("--quick", help="two minutes a claim")] = False,
    from_results: Annotated[bool, typer.Option("--from-results", help="read committed rows")] = False,
    study: Annotated[str, typer.Option(hidden=True)] = "",
    rows: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """The same as `edl reproduce`; --study and --rows are for the processes that it starts."""
    if study and rows is not None:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # ignored where a shell began it in the background
        signal.signal(signal.SIGTERM, _leave)
        found = CLAIMS[study].study().run_study(quick=quick)
        partial = rows.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in found))
        partial.replace(rows)
        return
    outcomes = reproduce(keys_of(claim), out, quick=quick, from_results=from_results)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


def keys_of(claim: str) -> list[str]:
    """The claims that a name stands for, [] for one that does not exist."""
    return list(CLAIMS) if claim == ALL else [claim] if claim in CLAIMS else []


if __name__ == "__main__":
    typer.run(main)
