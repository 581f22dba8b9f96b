"""The process that launched this rank and those beside it, where no variable names their job."""

from __future__ import annotations

import os
from pathlib import Path

from efficient_dl.errors import LaunchError


def launching_process(rank_variable: str) -> str:
    """The closest ancestor that is no rank itself: the launcher's daemon, which all ranks of a node have in common.

    rank_variable: what every rank has in its environment, as PMI_RANK, and so have shells between it and the daemon.
    Raises LaunchError where /proc does not show it.
    """
    pid, name = os.getppid(), f"{rank_variable}=".encode()
    while pid > 1:
        try:
            folder = Path("/proc") / str(pid)
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # from the third on
            if any(one.startswith(name) for one in (folder / "environ").read_bytes().split(b"\0")):
                pid = int(fields[1])
                continue
        except OSError:
            break
        return f"launched by process {pid} since {fields[19]}"
    raise LaunchError(
        "the ranks of this launch have nothing in common to find each other by",
        expected="PMIX_NAMESPACE, or the launcher among this process's ancestors",
        fix="set MASTER_ADDR=127.0.0.1 and MASTER_PORT to a free port for all ranks",
    )
