"""edl demo: the same small model three times, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficient_dl.commands.reporting import reported

EXAMPLE = """
[bold]Examples[/bold]

  edl demo

  edl demo --quick --out /tmp/edl-demo
"""


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the steps: see that it works.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of each of the three runs.")] = None,
    workers: Annotated[int, typer.Option(help="Local workers.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where the three runs and the plot go.")] = None,
) -> None:
    """Train the same small GPT three times, uncompressed, lossless and at 2 bits, and compare."""
    with reported():
        from efficient_dl.training.demo import run_demo

        run_demo(steps=steps, quick=quick, workers=workers, out=out)
