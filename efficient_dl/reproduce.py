"""`edl reproduce`: the thesis's claims, tested by the studies in benchmarks/, which a clone has and a wheel has not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from efficient_dl.errors import ConfigError

EXAMPLE = """
[bold]Examples[/bold]

  edl reproduce T1 --quick

  edl reproduce all --out runs/reproduce                    # hours; one page with all, runs/reproduce/index.html

  edl reproduce all --from-results                          # the page from the rows that are committed, in seconds

T1 weight entropy, T2 objectives, T3 layer-wise, T4 interlayer regularization, T5 partition-wise (emulated hosts: root),
T6 closed form, redundancy of examples. Each gets a folder with rows.jsonl, plot.svg and a page with its verdict.
Exit code 1 if a study failed; the others' results are kept. Needs a clone of the repository.
"""


def add_to(app: typer.Typer, reported: Callable[[], AbstractContextManager[Any]]) -> None:
    """Add the command to the command line. reported: turns errors into messages and exit codes."""

    @app.command(epilog=EXAMPLE)
    def reproduce(
        claim: Annotated[str, typer.Argument(help="T1 to T6, redundancy or all.")],
        quick: Annotated[bool, typer.Option("--quick", help="Small studies: 20 to 100 s each.")] = False,
        from_results: Annotated[
            bool, typer.Option("--from-results", help="Run nothing; read the rows in benchmarks/results.")
        ] = False,
        out: Annotated[Path, typer.Option(help="Folder of rows, plots and pages.")] = Path("runs/reproduce"),
    ) -> None:
        """Run the studies of the thesis's claims, and say from their rows what holds here."""
        with reported():
            failed = run(claim, out, quick=quick, from_results=from_results)
        if failed:
            raise typer.Exit(1)


def run(claim: str, out: Path, *, quick: bool, from_results: bool) -> bool:
    """Whether a study failed. Raises ConfigError for an unknown claim, contrary flags and outside a clone."""
    if quick and from_results:
        raise ConfigError("--from-results runs nothing, quick or not", fix="leave one of the two out")
    studies = _studies()
    keys = studies.keys_of(claim)
    if not keys:
        expected = ", ".join((*studies.CLAIMS, studies.ALL))
        raise ConfigError(f"there is no claim {claim!r}", expected=expected, fix="edl reproduce all --quick")
    outcomes = studies.reproduce(keys, out.resolve(), quick=quick, from_results=from_results)
    print(f"the page: {out / studies.PAGE if len(keys) > 1 else out / keys[0] / studies.PAGE}")
    return any(outcome.error for outcome in outcomes)


def _studies() -> Any:
    """benchmarks.reproduce, of the clone that this package was installed from in place, or of the working directory."""
    beside = Path(__file__).resolve().parent.parent
    for root in (beside, Path.cwd()):
        if (root / "benchmarks" / "reproduce.py").is_file():
            sys.path.insert(0, str(root))
            return importlib.import_module("benchmarks.reproduce")
    raise ConfigError(
        "the studies are not here",
        expected="benchmarks/reproduce.py in a clone's root",
        found=f"none in {Path.cwd()}, and the package is installed apart, in {beside}",
        fix="git clone the repository, cd into it and say edl reproduce there; or pip install -e it",
    )
