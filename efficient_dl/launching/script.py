"""What the scripts of all backends are put together from: shell words, and torchrun's command line."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from efficient_dl.launching.job import Job, command_words, is_python, without_out

# More than run.grace_seconds, in which `edl train` writes a checkpoint after a signal; then torchrun kills it.
SHUTDOWN_SECONDS = 60
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and Slurm's announcement


@dataclass(frozen=True)
class Submission:
    """A job ready to start: `text` goes to the standard input of `commands`, or is in them. Several: one a host."""

    text: str
    commands: tuple[tuple[str, ...], ...]
    reads_text: bool  # whether the command reads the text from its standard input


def head(job: Job, title: str, more: Iterable[str] = ()) -> str:
    """The first lines of a script: what it is, the scheduler's, strict mode, where it runs, its variables."""
    lines = ["#!/bin/bash", *(f"# {line}" for line in title.splitlines()), *more, "set -euo pipefail"]
    if job.folder:
        lines.append(f"cd -- {shlex.quote(job.folder)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    return "\n".join(lines) + "\n"


def program_words(job: Job, restarts: bool) -> list[str]:
    """What torchrun runs, as its last words. restarts: whether `edl train` must go on from what is there."""
    fixed = [] if is_python(job) else ["--no-python"]
    return [*fixed, *rank_words(job, restarts)]


def rank_words(job: Job, restarts: bool) -> list[str]:
    """The command of each rank, without the Python before it."""
    if job.runs_train and restarts:
        return command_words(without_out(job), ["--resume-or-start", "--out", job.out])
    return command_words(job)


def torchrun(
    job: Job, options: Sequence[str], program: Sequence[str], shutdown_seconds: int = SHUTDOWN_SECONDS
) -> str:
    """torchrun's command, one group of words a line. options, program: as the shell shall read them."""
    shared = [f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={shutdown_seconds}"]
    first = f"{shlex.quote(job.python)} -m torch.distributed.run"
    return lines([first, *options, " ".join(shared), " ".join(program)])


def lines(groups: Sequence[str], indent: int = 4) -> str:
    """One command over several lines."""
    return f" \\\n{' ' * indent}".join(one for one in groups if one)


def quoted(words: Iterable[str]) -> list[str]:
    """Each word as a shell reads it back."""
    return [shlex.quote(word) for word in words]
