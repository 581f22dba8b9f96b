"""The command line: edl train, edl launch, edl probe, edl demo, edl doctor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from efficient_dl.errors import ConfigError, EdlError

if TYPE_CHECKING:
    from efficient_dl.config import Config
    from efficient_dl.training import Summary, Worker
    from efficient_dl.training.probing import WhatIf

app = typer.Typer(
    name="edl",
    help="Distributed training in torch with entropy-coded gradients: lossless, or about two bits a value.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

TRAIN_EXAMPLE = """
[bold]Examples[/bold]

  edl train --model gpt-micro --data stdlib --bits 2.0 --workers 2 --steps 200 --out runs/first

  edl train --out runs/first --resume --steps 400

  torchrun --nnodes 2:4 --max-restarts 8 ... -m efficient_dl.cli train ... --out /shared/run --resume-or-start

  edl train --model gpt-micro --data stdlib --mode layerwise --partitions 4 --out runs/layers

  edl train --model gpt-micro --data stdlib --mode partitionwise --partitions 2 --workers 2 --out runs/parts

  torchrun --nproc-per-node 4 -m efficient_dl.cli train --model resnet18 --data fashion-mnist --bits lossless

Settings come from --config (or, with --resume, from the run's folder), then the flags, then --set; later wins.
Every run's folder has a config.toml with all settings and what each means: edit a copy for --config.
"""

DEMO_EXAMPLE = """
[bold]Examples[/bold]

  edl demo

  edl demo --quick --out /tmp/edl-demo
"""

PROBE_EXAMPLE = """
[bold]Examples[/bold]

  edl probe --model gpt-micro --data stdlib --workers 2

  edl probe --model gpt-micro --data stdlib --what-if rate=400mbit,hosts=16

  edl probe --what-if rate=100mbit,hosts=4,workers-per-host=8,latency=5ms --json plan.json

  torchrun --nnodes 2 --nproc-per-node 8 ... -m efficient_dl.cli probe --config runs/first/config.toml
"""

LAUNCH_EXAMPLE = """
[bold]Examples[/bold]

  edl launch local --workers 2 -- train --model gpt-micro --bits 2.0 --out runs/first

  edl launch torchrun --hosts a,b --workers 8 --gpus 8 -- train --config run.toml --out runs/two-hosts

  edl launch slurm --nodes 4 --workers 8 --gpus 8 --time 12:00:00 --account me --dry-run -- train --config run.toml

  edl launch slurm --nodes 1 --sweep "--seed 1" --sweep "--seed 2 --lr 0.001" -- train --model gpt-mini

  edl launch mpirun --mpi mpich --nodes 2 --workers 4 -- train --bits 2.0 --transport mpi

  edl launch kubernetes --nodes 2 --image registry/edl:1 --claim shared -- train --model gpt-mini

  edl launch slurm --job job.toml -- my_script.py --its-own-flag

What follows -- is train or probe and their flags, a .py file, -m MODULE or a program. --dry-run prints exactly what
would be started. --job reads the same settings from a TOML file (docs/launch.md); flags win.
"""

DOCTOR_EXAMPLE = """
[bold]Example[/bold]

  edl doctor
"""


@dataclass(frozen=True)
class TrainFlags:
    """What was given on the command line of `edl train`, before it is checked."""

    settings: list[str] = field(default_factory=list)  # section.key=value, the flags' before --set's
    workers: int | None = None
    out: Path | None = None
    resume: bool = False
    or_start: bool = False  # without a run to resume, start it: for jobs that are restarted by others
    config: Path | None = None


@app.command(epilog=TRAIN_EXAMPLE)
def train(
    model: Annotated[
        str | None,
        typer.Option(help="mlp, vgg8b, resnet18 or gpt, with a size: gpt-nano, gpt-micro, gpt-mini."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="stdlib, digits, fashion-mnist or tokens:PATH.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="cross-entropy, linear, expgb, pow3gb, squentropy or rescaled-square: the loss."),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, adamw or muon.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="none, identity, lossless, auto or bits a value, as 2.0.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="end-to-end, layerwise or partitionwise: what is trained at once, and where."),
    ] = None,
    partitions: Annotated[
        int | None, typer.Option(help="Parts that the model is cut into, for layerwise and partitionwise.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="2: a partition also learns from the next one's loss; layerwise.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="What step sizes follow: auto, local, global or second_moment.")
    ] = None,
    hierarchy: Annotated[
        str | None,
        typer.Option(
            help="Compress between nodes only: plan (where it pays), none, auto or the workers on each node."
        ),
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="What carries compressed bytes: process_group, or mpi under mpirun.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Local workers to start; under a launcher, the ranks it must have.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a worker takes at once.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its peak.")] = None,
    seed: Annotated[int | None, typer.Option(help="The only source of randomness.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/ and a name).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            help="Continue the run in --out, or start it: for jobs that are restarted, by torchrun or a scheduler.",
        ),
    ] = False,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; repeatable.")
    ] = None,
) -> None:
    """Train a model on one machine's workers, or as one rank of a launcher (torchrun, a job script)."""
    name, dash, size = (model or "").partition("-")
    given = {
        "model.name": None if model is None else name,
        "model.size": size if dash else None,
        "data.name": data,
        "train.objective": objective,
        "optimizer.name": optimizer,
        "compression.bits": bits,
        "local.mode": mode,
        "local.partitions": partitions,
        "local.window": window,
        "compression.scale": scale,
        "compression.hierarchy": hierarchy,
        "compression.transport": transport,
        "run.workers": workers,
        "train.steps": steps,
        "data.batch_size": batch_size,
        "optimizer.lr": lr,
        "train.seed": seed,
        "run.out": out,
    }
    settings = [f"{key}={value}" for key, value in given.items() if value is not None]
    flags = TrainFlags([*settings, *(set_ or [])], workers, out, resume, resume_or_start, config)
    with _reported() as outcome:
        from efficient_dl.training import launch, launched

        if launched():
            launch(1, train_rank, flags)
        else:
            from efficient_dl.training.run import with_folder

            flags = with_resume(flags)
            named = settled_config(flags)
            settled = with_folder(named, flags.resume)
            outcome.folder = Path(settled.run.out)
            outcome.is_new = not named.run.out
            grace_seconds = settled.run.grace_seconds
            launch(settled.run.workers, train_rank, flags, settled, grace_seconds=grace_seconds)


@app.command(epilog=DEMO_EXAMPLE)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the steps: see that it works.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of each of the three runs.")] = None,
    workers: Annotated[int, typer.Option(help="Local workers.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where the three runs and the plot go.")] = None,
) -> None:
    """Train the same small GPT three times, uncompressed, lossless and at 2 bits, and compare."""
    with _reported():
        from efficient_dl.training.demo import run_demo

        run_demo(steps=steps, quick=quick, workers=workers, out=out)


@app.command(epilog=PROBE_EXAMPLE)
def probe(
    model: Annotated[str | None, typer.Option(help="As for edl train: gpt-micro, resnet18, ...")] = None,
    data: Annotated[str | None, typer.Option(help="As for edl train.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Local workers to start: 2, or 1 with --what-if.")
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
    with _reported():
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


@app.command(name="launch", epilog=LAUNCH_EXAMPLE)
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
    with _reported():
        from efficient_dl.launching.job import described_job, variables
        from efficient_dl.launching.submit import show, start, submission

        values = {key: value for key, value in given.items() if value is not None}
        made = submission(
            described_job(backend, job, {**values, "environment": variables(env or [])}, dry_run)
        )
        if dry_run:
            show(made)
        elif code := start(made):
            raise typer.Exit(code)


@app.command(epilog=DOCTOR_EXAMPLE)
def doctor() -> None:
    """Say what this machine has: versions, codec kernels, cores, GPUs, data, network namespaces."""
    with _reported():
        from efficient_dl.training.doctor import print_report

        print_report()


def train_rank(worker: Worker, flags: TrainFlags, settled: Config | None = None) -> Summary:
    """One rank of `edl train`. settled: the configuration, if the process that started the workers made it."""
    from efficient_dl.training import run_worker

    if settled is None:
        decided = worker.together("resume", lambda: with_resume(flags))
        first = worker.gather("resume", decided.resume)[
            0
        ]  # a shared folder may show itself to other ranks later
        flags = dataclasses.replace(flags, resume=first)
    config = settled or worker.together("settings", lambda: settled_config(flags))
    return run_worker(worker, [config], flags.resume, restarted=flags.or_start)[0]


def with_resume(flags: TrainFlags) -> TrainFlags:
    """The flags, with --resume-or-start decided: whether there is a run to resume."""
    from efficient_dl.training.run_folder import holds_run

    if not flags.or_start:
        return flags
    if flags.out is None:
        raise ConfigError(
            "--resume-or-start needs to know which run",
            expected="--out DIR",
            fix="edl train --out runs/first --resume-or-start",
        )
    return dataclasses.replace(flags, resume=holds_run(flags.out))


def probe_rank(worker: Worker, config: Config, out: Path | None, what_if: WhatIf | None) -> None:
    """One rank of `edl probe`."""
    from efficient_dl.training.probing import run_probe

    run_probe(worker, config, out, what_if)


def settled_config(flags: TrainFlags, new_run: bool = True) -> Config:
    """The run's configuration, checked as far as that goes without data. Raises EdlError.

    new_run: whether its folder must be free, unless it is resumed.
    """
    from efficient_dl.config import Config, load_config, with_overrides
    from efficient_dl.data import check_data
    from efficient_dl.models import check_model
    from efficient_dl.training import check_world_size
    from efficient_dl.training.run_folder import check_free, recorded_config

    if flags.resume and flags.out is None:
        raise ConfigError(
            "--resume needs to know which run",
            expected="--out DIR",
            fix="edl train --out runs/first --resume",
        )
    if flags.config is not None:
        config = load_config(flags.config)
    elif flags.resume and flags.out is not None:
        config = recorded_config(flags.out)
    else:
        config = Config()
    config = with_overrides(config, flags.settings)
    asked = flags.workers is not None or any(one.startswith("run.workers") for one in flags.settings)
    if asked:
        check_world_size(config.run.workers)
    check_model(config.model)
    check_data(config.data)
    if new_run and config.run.out and not flags.resume:
        check_free(Path(config.run.out))
    return config


@dataclass
class Outcome:
    """What a command that is stopped says about the run it leaves behind."""

    folder: Path | None = None
    is_new: bool = False  # made for this run, under a default name

    def tidy(self) -> None:
        """Remove a folder that was made for a run that never wrote into it."""
        if self.folder is not None and self.is_new:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # fails unless it is empty

    def text(self) -> str:
        if self.folder is None:
            return ""
        from efficient_dl.training.checkpoint import CheckpointFolder
        from efficient_dl.training.run_folder import CHECKPOINTS

        step = CheckpointFolder(self.folder / CHECKPOINTS).latest()
        if step is None:
            return "\n  There was no checkpoint yet."
        return f"\n  The last checkpoint is of step {step}.\n  fix: edl train --out {self.folder} --resume"


@contextlib.contextmanager
def _reported() -> Iterator[Outcome]:
    """End the command with an error's exit code and without a traceback, if the error is the user's."""
    from efficient_dl.training.console import print_error
    from efficient_dl.training.launch import WorkersFailed
    from efficient_dl.training.signals import Stopped

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    outcome = Outcome()
    try:
        yield outcome
    except EdlError as error:
        print_error(f"{type(error).__name__}: {error}")
        raise typer.Exit(error.exit_code) from None
    except WorkersFailed as failed:
        raise typer.Exit(failed.exit_code) from None
    except (Stopped, KeyboardInterrupt) as stopped:
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        name = signal.Signals(number).name
        print_error(f"Stopped by {name}; all workers have ended.{outcome.text()}")
        raise typer.Exit(128 + number) from None
    finally:
        outcome.tidy()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once, as an interrupt in the middle of torch's import leaves nothing to tidy."""
    os.write(2, f"Stopped by {signal.Signals(number).name}.\n".encode())
    os._exit(128 + number)


def main() -> None:
    """The entry point of `edl`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # until torch is imported, which takes seconds
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the engine's warnings repeat what our errors say
    app()


if __name__ == "__main__":
    main()
