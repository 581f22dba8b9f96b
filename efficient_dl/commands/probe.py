"""edl probe: would compression pay here?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficient_dl.commands.reporting import reported
from efficient_dl.commands.train import TrainFlags, settled_config

if TYPE_CHECKING:
    from efficient_dl.config import Config
    from efficient_dl.training import Worker
    from efficient_dl.training.probing import WhatIf

EXAMPLE = """
[bold]Examples[/bold]

  edl probe --model gpt-micro --data stdlib --workers 2

  edl probe --model gpt-micro --data stdlib --what-if rate=400mbit,hosts=16

  edl probe --what-if rate=100mbit,hosts=4,workers-per-host=8,latency=5ms --json plan.json

  torchrun --nnodes 2 --nproc-per-node 8 ... -m efficient_dl.cli probe --config runs/first/config.toml
"""


def probe(
    model: Annotated[str | None, typer.Option(help="As for edl train: gpt-micro, resnet18, ...")] = None,
    data: Annotated[str | None, typer.Option(help="As for edl train.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Local workers to start: 2, or 1 with --what-if, or as --config says.")
    ] = None,
    floor_bits: Annotated[
        float | None, typer.Option(help="The fewest bits a value that may be chosen.")
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(
            metavar="rate=RATE,hosts=N",
            help="Measure codecs and backward here, and imagine the network; also workers-per-host=N, latency=5ms.",
        ),
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; repeatable.")
    ] = None,
) -> None:
    """Measure links, codecs and backward, and say which compression would pay, below which link speed."""
    name, dash, size = (model or "").partition("-")
    given = {
        "model.name": None if model is None else name,
        "model.size": size if dash else None,
        "data.name": data,
        "compression.floor_bits": floor_bits,
    }
    with reported():
        from efficient_dl.training import launch, launched
        from efficient_dl.training.probing import WhatIf

        if not launched() and config is None:
            workers = workers or (1 if what_if else 2)
        settings = [
            f"{key}={value}" for key, value in {**given, "run.workers": workers}.items() if value is not None
        ]
        flags = TrainFlags([*settings, *(set_ or [])], workers, config=config)
        imagined = None if what_if is None else WhatIf.of(what_if)
        settled = settled_config(flags, new_run=False)
        launch(1 if launched() else settled.run.workers, probe_rank, settled, json_, imagined)


def probe_rank(worker: Worker, config: Config, out: Path | None, what_if: WhatIf | None) -> None:
    """One rank of `edl probe`."""
    from efficient_dl.training.probing import run_probe

    run_probe(worker, config, out, what_if)
