"""Whose error is reported when ranks end at different times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from efficient_dl.launching import ends
from tests.distributed.edl_ranks import free_port

# Rank 1 has the error, and reads the others' answers only when rank 0, where the store lives, has long known it.
SCRIPT = """
import dataclasses, time
from efficient_dl.errors import ConfigError
from efficient_dl.training.worker import work

class Slow:
    def __init__(self, store):
        self.set, self.check, self._store = store.set, store.check, store

    def get(self, key):
        time.sleep(0.5)
        return self._store.get(key)

def step(rank):
    if rank == 1:
        raise ConfigError("a wrong setting")

def main(worker):
    if worker.rank == 1:
        worker = dataclasses.replace(worker, store=Slow(worker.store))
    worker.together("a step", lambda: step(worker.rank))

work(main)
"""


def test_a_rank_that_is_slow_to_hear_of_the_end_still_reports_its_own_error(tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    shared[ends.VARIABLE] = str(tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=250)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], printed
    assert printed[0] == ""
    assert printed[1].startswith("rank 1: ConfigError: a wrong setting")
    assert [path.name for path in tmp_path.iterdir()] == ["2"]  # what a job's script finds
