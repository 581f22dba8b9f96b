"""How ranks tell a job's script their exit codes: torchrun's is always 1, and mpirun's may be 0. Imports no torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from efficient_dl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFull,
    EdlError,
    PlanMismatch,
    TransportError,
)

# A folder that all ranks see; the script (slurm.py, mpirun.py) makes it, and looks into it.
VARIABLE = "EDL_ENDS"
FINAL: tuple[type[EdlError], ...] = (ConfigError, DataError, PlanMismatch, CheckpointError, DiskFull)
FINAL_CODES = tuple(sorted(one.exit_code for one in FINAL))  # another start would end the same way
# Of ranks that others, or a signal, have ended, the most telling last: hang-up, Ctrl-C, SIGTERM, SIGUSR1, a lost peer.
CONSEQUENCES = (129, 130, 143, 138, TransportError.exit_code)
_TELL_SECONDS = 5.0  # then the file system is taken to be gone with the link


def tell_end(code: int, environment: Mapping[str, str]) -> None:
    """Leaves an empty file named by the exit code, 0 too, where the script looks for it, if a script does."""
    folder = environment.get(VARIABLE)
    if folder is None:
        return
    failures = ["no answer of the file system"]

    def leave() -> None:
        try:
            (Path(folder) / str(code)).touch()
            failures.clear()
        except OSError as error:
            failures[:] = [str(error)]

    leaving = threading.Thread(target=leave, name="edl-end", daemon=True)
    leaving.start()
    leaving.join(_TELL_SECONDS)
    if failures:
        sys.stderr.write(f"exit code {code} could not be left in {VARIABLE}={folder}: {failures[0]}\n")


def end_at_once(code: int) -> NoReturn:
    """Ends this process whatever its threads do, and tells the script."""
    try:
        tell_end(code, os.environ)
    finally:
        os._exit(code)
