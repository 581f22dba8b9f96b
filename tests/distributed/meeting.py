"""Lets a rank that plays dead stay until the others are done, however slow the machine is."""

from __future__ import annotations

import time
from pathlib import Path

PATIENCE_SECONDS = 150.0  # on a machine that may be busy


def stay_until(path: Path) -> None:
    """Waits until another rank has made this file; fails if none does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody has made {path} within {PATIENCE_SECONDS} s"
        time.sleep(0.02)
