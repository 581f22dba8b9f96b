"""Starts a job, or prints what would be started."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from efficient_dl.errors import LaunchError
from efficient_dl.launching import torchrun
from efficient_dl.launching.job import Job
from efficient_dl.launching.kubernetes import kubernetes
from efficient_dl.launching.mpirun import mpirun
from efficient_dl.launching.script import Submission
from efficient_dl.launching.slurm import slurm

_BACKENDS: dict[str, Callable[[Job], Submission]] = {
    "local": torchrun.local,
    "torchrun": torchrun.hosts,
    "slurm": slurm,
    "mpirun": mpirun,
    "kubernetes": kubernetes,
}
_SUBMIT_SECONDS = 300  # for sbatch or kubectl
_OTHERS_SECONDS = 90  # for the other hosts to notice that one has failed
_POLL_SECONDS = 0.2


def submission(job: Job) -> Submission:
    """What starts this job. Raises ConfigError."""
    return _BACKENDS[job.backend](job)


def show(made: Submission) -> None:
    """Print the script or manifest on stdout, and on stderr how it would be started."""
    sys.stdout.write(made.text)
    sys.stdout.flush()
    for words in made.commands or (("HEAD=first-host", "bash", "torchrun.sh"),):
        shown = shlex.join([*words[:-1], "SCRIPT"] if _holds_text(words, made) else words)
        sys.stderr.write(f"{'start' if made.commands else 'start on every host'}: {shown}\n")


def start(made: Submission) -> int:
    """Start the job; the exit code. One process on this machine replaces this one and does not return.

    Without commands, where only the user can reach the hosts, it is shown. Raises LaunchError if a program is missing.
    """
    if not made.commands:
        show(made)
        return 0
    with _found(made.commands[0][0]):
        if made.reads_text:
            return subprocess.run(
                made.commands[0], input=made.text.encode(), timeout=_SUBMIT_SECONDS, check=False
            ).returncode
        if len(made.commands) == 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os.execvp(made.commands[0][0], made.commands[0])
        hosts = [
            subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0) for words in made.commands
        ]
    return _watched(hosts)


def _watched(hosts: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all hosts; the first failure's exit code. The others then get time to end by themselves."""
    code, deadline = 0, float("inf")
    with _forwarded(hosts):
        try:
            while any(host.poll() is None for host in hosts):
                failed = [host.returncode for host in hosts if host.returncode]
                if failed and not code:
                    code, deadline = failed[0], time.monotonic() + _OTHERS_SECONDS
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            for stop in (subprocess.Popen[bytes].terminate, subprocess.Popen[bytes].kill):
                for host in hosts:
                    if host.poll() is None:
                        stop(host)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    for host in hosts:
                        host.wait(_POLL_SECONDS if stop is subprocess.Popen.kill else 15)
    code = code or next((host.returncode for host in hosts if host.returncode), 0)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _forwarded(hosts: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside, signals go to the hosts' processes, which are in process groups of their own."""

    def forward(number: int, frame: FrameType | None) -> None:
        for host in hosts:
            if host.poll() is None:
                host.send_signal(signal.SIGHUP if number == signal.SIGINT else number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.signal(number, forward)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def _found(program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LaunchError(
            f"there is no {program} here",
            expected=f"the program {program} on the PATH",
            fix="start it where it is, or take --dry-run, and start what that prints",
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{program} has not ended after {_SUBMIT_SECONDS} s", fix=f"look whether {program} works"
        ) from None


def _holds_text(words: tuple[str, ...], made: Submission) -> bool:
    return words[-1] == made.text or shlex.join(["bash", "-c", made.text]) == words[-1]
