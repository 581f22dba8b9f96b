"""edl launch: one description, a job anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficient_dl.commands.checking import check_command
from efficient_dl.commands.reporting import reported

EXAMPLE = """
[bold]Examples[/bold]

  edl launch local --workers 2 -- train --model gpt-micro --bits 2.0 --out runs/first

  edl launch torchrun --hosts a,b --workers 8 -- train --config run.toml --out runs/two-hosts

  edl launch slurm --nodes 4 --workers 8 --gpus 8 --time 12:00:00 --account me --dry-run -- train --config run.toml

  edl launch slurm --nodes 1 --sweep "--seed 1" --sweep "--seed 2 --lr 0.001" -- train --model gpt-mini

  edl launch mpirun --mpi mpich --nodes 2 --workers 4 -- train --bits 2.0 --transport mpi

  edl launch kubernetes --nodes 2 --image registry/edl:1 --claim shared -- train --model gpt-mini

  edl launch slurm --job job.toml -- my_script.py --its-own-flag

What follows -- is train or probe and their flags, a .py file, -m MODULE or a program. --dry-run prints exactly what
would be started. --job reads the same settings from a TOML file (docs/launch.md); flags win.
"""


def launch_job(
    backend: Annotated[str, typer.Argument(help="local, torchrun, slurm, mpirun or kubernetes.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND...", help="train and its flags, or another program."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines: 2 unless local.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on each: 4.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each node: 0.")] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores of each worker: 4.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node, as 64G.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm's limit, as 12:00:00: an hour.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    image: Annotated[
        str | None, typer.Option(help="A container image, for slurm (pyxis) and kubernetes.")
    ] = None,
    claim: Annotated[str | None, typer.Option(help="The volume claim of a JobSet where runs lie.")] = None,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="For torchrun (by ssh, the first one holds the rendezvous) and mpirun."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Of the rendezvous: 29400.")] = None,
    mpi: Annotated[str | None, typer.Option(help="Whose mpirun: openmpi or mpich.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="A variable of the workers; repeatable."),
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Where the command runs: the current folder.")] = None,
    python: Annotated[str | None, typer.Option(help="The Python on the nodes: python.")] = None,
    name: Annotated[str | None, typer.Option(help="The job's name: edl.")] = None,
    restarts: Annotated[int | None, typer.Option(help="How often a failed job begins again: 3.")] = None,
    lead_seconds: Annotated[
        int | None, typer.Option(help="How long before its end Slurm announces it: 120.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="WORDS", help="Words of one job of an array; repeatable."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="--WORD", help="Another option of sbatch, torchrun or mpirun; repeatable."
        ),
    ] = None,
    job: Annotated[Path | None, typer.Option(help="A TOML file with any of these.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started.")] = False,
) -> None:
    """Start a job here, over hosts, by Slurm, mpirun or Kubernetes, from one description."""
    given = {
        "nodes": nodes, "workers": workers, "gpus": gpus, "cpus": cpus, "memory": memory, "time": time,
        "partition": partition, "account": account, "image": image, "claim": claim, "port": port, "mpi": mpi,
        "folder": folder, "python": python, "name": name, "restarts": restarts, "lead_seconds": lead_seconds,
        "hosts": None if hosts is None else tuple(hosts.split(",")),
        "sweep": None if sweep is None else tuple(sweep),
        "options": None if option is None else tuple(option),
        "command": tuple(command) if command else None,
    }  # fmt: skip
    with reported():
        from efficient_dl.launching.job import described_job, variables
        from efficient_dl.launching.submit import show, start, submission

        values = {key: value for key, value in given.items() if value is not None}
        described = described_job(backend, job, {**values, "environment": variables(env or [])}, dry_run)
        elsewhere = dry_run or bool(described.image) or described.backend == "kubernetes"
        for note in check_command(described, elsewhere):
            typer.echo(f"note: {note}", err=True)
        made = submission(described)
        if dry_run:
            show(made)
        elif code := start(made):
            raise typer.Exit(code)
