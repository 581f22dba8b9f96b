"""Checks the flags and settings of a command that is to be submitted: in a queue their errors would cost hours."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.main import get_command

from efficient_dl.commands.probe import probe
from efficient_dl.commands.train import flags_of, merged_config, train
from efficient_dl.errors import ConfigError

if TYPE_CHECKING:
    from efficient_dl.launching.job import Job

_UsageError: Any = typer.BadParameter.__base__  # click's, or that of the click inside typer


def check_command(job: Job, elsewhere: bool) -> list[str]:
    """Check `train` or `probe` with all their words, for every job of a sweep. Returns what could not be checked.

    elsewhere: the job may run where other files are than here, so that a configuration that is not here is no error.
    Raises ConfigError. Other commands are their own business.
    """
    notes: list[str] = []
    for more in job.settings or [[]]:
        words = [*job.command[1:], *more]
        if job.command[0] == "probe":
            given(probe, words, "edl probe")
        elif job.runs_train:
            notes += _check_train(job, words, elsewhere)
    return list(dict.fromkeys(notes))


def given(command: Callable[..., None], words: Sequence[str], name: str) -> dict[str, Any]:
    """The arguments that the command line would call the command with. Raises ConfigError."""
    found: list[dict[str, Any]] = []
    app = typer.Typer(add_completion=False)
    app.command()(functools.wraps(command)(lambda **values: found.append(values)))
    try:
        get_command(app).main(list(words), prog_name=name, standalone_mode=False)
    except _UsageError as error:
        raise ConfigError(
            error.format_message(), where=shlex.join([*name.split(), *words]), fix=f"see {name} --help"
        ) from None
    if not found:
        raise typer.Exit  # --help, which has been printed
    return found[0]


def _check_train(job: Job, words: Sequence[str], elsewhere: bool) -> list[str]:
    from efficient_dl.config import Config, with_overrides
    from efficient_dl.training.resume import check_same_training
    from efficient_dl.training.run_folder import holds_run, recorded_config

    flags = flags_of(**given(train, words, "edl train"))
    folder = Path(job.folder)
    runs = [folder / job.out, *(folder / job.out / str(number) for number in range(len(job.sweep)))]
    begun = job.begins_again and not elsewhere and any(map(holds_run, runs))
    if begun and job.given_out is None:
        raise ConfigError(
            f"{job.out} holds a run, which this job would go on with",
            fix=f"--out DIR for a new one, or --out {job.out} to go on with that one",
        )
    if flags.config is None:
        resume = not elsewhere and not job.sweep and job.backend != "local" and holds_run(folder / job.out)
        config = merged_config(dataclasses.replace(flags, out=folder / job.out, resume=resume))
        if resume and begun:
            check_same_training(recorded_config(folder / job.out), config)
        return []
    file = folder / flags.config
    if elsewhere and not file.exists():
        with_overrides(Config(), flags.settings)
        return [f"{file} is not here: its settings were not checked"]
    merged_config(dataclasses.replace(flags, config=file))
    return []
