"""Runs a launcher's script beside stand-ins for the programs that it calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

TRAIN = ("train", "--model", "mlp-nano")


def run_script(
    folder: Path, text: str, number: signal.Signals | None, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Run a script with the stand-ins in a folder, send it a signal once one of them is up; exit code and output."""
    log = folder / "log"
    with log.open("w") as out:
        job = subprocess.Popen(
            ["bash", "-c", text],
            cwd=folder,
            env={"PATH": f"{folder}:/usr/bin:/bin", **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        if number is not None:
            deadline = time.monotonic() + 30
            while "up" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            job.send_signal(number)
        return job.wait(100), log.read_text()
    finally:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
