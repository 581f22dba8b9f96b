"""How every command of `edl` ends: an error's message and exit code, what a stopped run leaves, no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from efficient_dl.errors import EdlError


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
def reported() -> Iterator[Outcome]:
    """End the command with an error's exit code and without a traceback, if the error is the user's."""
    from efficient_dl.training.console import print_error
    from efficient_dl.training.launch import WorkersFailed
    from efficient_dl.training.signals import Stopped

    if signal.getsignal(signal.SIGINT) is leave_at_once:
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


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """End at once, as an interrupt in the middle of torch's import leaves nothing to tidy."""
    os.write(2, f"Stopped by {signal.Signals(number).name}.\n".encode())
    os._exit(128 + number)
