"""edl train: from flags to checked settings, and on to the ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficient_dl.commands.reporting import reported
from efficient_dl.errors import ConfigError

if TYPE_CHECKING:
    from efficient_dl.config import Config
    from efficient_dl.training import Summary, Worker

EXAMPLE = """
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


_KEYS = {  # by flag, the setting that it gives
    "data": "data.name",
    "objective": "train.objective",
    "optimizer": "optimizer.name",
    "entropy_every": "entropy.every",
    "bits": "compression.bits",
    "mode": "local.mode",
    "partitions": "local.partitions",
    "window": "local.window",
    "keep_examples": "local.keep_examples",
    "scale": "compression.scale",
    "messages": "compression.messages",
    "hierarchy": "compression.hierarchy",
    "transport": "compression.transport",
    "steps": "train.steps",
    "batch_size": "data.batch_size",
    "lr": "optimizer.lr",
    "seed": "train.seed",
}


@dataclass(frozen=True)
class TrainFlags:
    """What was given on the command line of `edl train`, before it is checked."""

    settings: list[str] = field(default_factory=list)  # section.key=value, the flags' before --set's
    workers: int | None = None
    out: Path | None = None
    resume: bool = False
    or_start: bool = False  # without a run to resume, start it: for jobs that are restarted by others
    config: Path | None = None


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
    entropy_every: Annotated[
        int | None, typer.Option(help="Steps between measurements of entropies; 500 is cheap. 0: none.")
    ] = None,
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
    keep_examples: Annotated[
        float | None,
        typer.Option(help="Share of its examples that a partition hands on, those of large loss; layerwise."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="What step sizes follow: auto, local, global or second_moment.")
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            help="exact, or bounded: as long as bits says, so that no sizes travel; auto: what is faster, "
            "with bits auto."
        ),
    ] = None,
    hierarchy: Annotated[
        str | None,
        typer.Option(
            help="Compress between nodes only: plan (where it pays), none, auto or the workers on each node; or groups."
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
    given = dict(locals())
    with reported() as outcome:
        from efficient_dl.training import launch, launched

        flags = flags_of(**given)
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


def flags_of(
    *,
    model: str | None,
    workers: int | None,
    out: Path | None,
    resume: bool,
    resume_or_start: bool,
    config: Path | None,
    set_: list[str] | None,
    **named: object,
) -> TrainFlags:
    """What the arguments of `train` ask for. named: the others, by name. Raises ConfigError for two folders."""
    if (out is not None or resume_or_start) and any(one.startswith("run.out=") for one in set_ or []):
        raise ConfigError(
            "a run's folder is given by --out here",
            found=next(one for one in set_ or [] if one.startswith("run.out=")),
            fix="--out DIR, and no --set run.out=",
        )
    name, dash, size = (model or "").partition("-")
    given = {
        "model.name": None if model is None else name,
        "model.size": size if dash else None,
        **{_KEYS[flag]: value for flag, value in named.items()},
        "run.workers": workers,
        "run.out": out,
    }
    settings = [f"{key}={value}" for key, value in given.items() if value is not None]
    return TrainFlags([*settings, *(set_ or [])], workers, out, resume, resume_or_start, config)


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


def settled_config(flags: TrainFlags, new_run: bool = True) -> Config:
    """The run's configuration, checked as far as that goes without data. Raises EdlError.

    new_run: whether its folder must be free, unless it is resumed.
    """
    from efficient_dl.training import check_world_size
    from efficient_dl.training.run_folder import check_free

    config = merged_config(flags)
    if flags.workers is not None or any(one.startswith("run.workers") for one in flags.settings):
        check_world_size(config.run.workers)
    if new_run and config.run.out and not flags.resume:
        check_free(Path(config.run.out))
    return config


def merged_config(flags: TrainFlags) -> Config:
    """What the file or the recorded run and the flags say together, for models and data that exist.

    Raises EdlError, also for settings that contradict each other.
    """
    from efficient_dl.config import Config, load_config, with_overrides
    from efficient_dl.data import check_data
    from efficient_dl.models import check_model
    from efficient_dl.training.run_folder import recorded_config
    from efficient_dl.training.setting_checks import check_settings

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
    architecture = check_model(config.model)
    check_data(config.data)
    check_settings(config, architecture.kind)
    return config
