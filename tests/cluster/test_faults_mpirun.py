"""mpirun restarts nothing: what is killed ends the job with a checkpoint, and the same command goes on.

One of the cases of benchmarks/faults.py, which has them all; the others would take minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_cases import MPIRUN
from benchmarks.faults import measure


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.mpi("openmpi")
@pytest.mark.timeout(700)
def test_ranks_whose_daemon_was_killed_end_with_a_checkpoint(tmp_path: Path) -> None:
    found = measure(MPIRUN["daemon-killed"], tmp_path / "case", {}, "mpirun")
    assert found.left == 0
    assert found.outcome.lost_steps == 0
