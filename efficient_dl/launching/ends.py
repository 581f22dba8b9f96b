"""How ranks tell a job's script their exit codes: torchrun's own is 1, whatever theirs are. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from efficient_dl.errors import CheckpointError, ConfigError, DataError, DiskFull, EdlError, PlanMismatch

VARIABLE = (
    "EDL_ENDS"  # a folder that all ranks see; the script (slurm.py) makes it, and looks into it afterwards
)
FINAL: tuple[type[EdlError], ...] = (ConfigError, DataError, PlanMismatch, CheckpointError, DiskFull)
FINAL_CODES = tuple(sorted(one.exit_code for one in FINAL))  # another start would end the same way


def tell_end(code: int, environment: Mapping[str, str]) -> None:
    """Leaves an empty file named by the exit code where the script looks for it, if a script does."""
    folder = environment.get(VARIABLE)
    if folder is None or code == 0:
        return
    try:
        (Path(folder) / str(code)).touch()
    except OSError as error:
        sys.stderr.write(f"exit code {code} could not be left in {VARIABLE}={folder}: {error}\n")
