"""A signal that arrives inside one of torch's callbacks ends a worker as any other does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# As torch does with an exception raised in a communication hook.
SCRIPT = """
import os, signal, sys
from efficient_dl.training.worker import work

def main(worker):
    try:
        os.kill(os.getpid(), signal.Signals(int(sys.argv[1])))
    except BaseException as error:
        raise RuntimeError(f"Got the following error when running the callback: {error}") from None

work(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_torch_wraps_in_its_own_error_is_still_a_signal(number: signal.Signals) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(number))],
        env={**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number
    assert done.stderr.strip() == f"Stopped by {number.name}."
