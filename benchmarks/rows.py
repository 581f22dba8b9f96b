"""One row a measurement: the format that all benchmarks append to their --out file."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """What was measured: the benchmark, its case, the system, and one metric with its unit."""

    bench: str
    case: str
    system: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool


class RowFile:
    """Appends rows to a JSON Lines file (or to nothing, if path is None) and keeps them for the printed table."""

    def __init__(self, path: Path | None) -> None:
        self.rows: list[Row] = []
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Writes one row, with the machine it was measured on and the machine's load."""
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(as_dict(row), allow_nan=False) + "\n")


def as_dict(row: Row) -> dict[str, Any]:
    """The row as a line of a file has it, with the machine; what is not finite becomes None, as JSON knows no NaN."""
    load = round(os.getloadavg()[0], 1)  # of the last minute: what else the machine did
    value = row.value if math.isfinite(row.value) else None
    return {**asdict(row), "value": value, "env": {**environment(), "load": load}}


@cache
def environment() -> dict[str, str | int]:
    """Commit, date, processor, cores and versions."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    isa = "AVX-512" if any("avx512f" in line for line in lines if line.startswith("flags")) else "no AVX-512"
    return f"{names[0] if names else platform.machine()} ({isa})"
