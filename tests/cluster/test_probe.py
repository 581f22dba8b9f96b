"""The probe finds the speed that a link was given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster.emulate import EmulatedNetwork

pytestmark = [pytest.mark.netns, pytest.mark.slow]

MEGABIT = 1e6 / 8


@pytest.mark.timeout(250)
def test_the_measured_bandwidth_is_the_shaped_one_within_15_percent(tmp_path: Path) -> None:
    """Slow enough that the link, and not this machine's load, decides."""
    file = tmp_path / "plan.json"
    command = ["probe", "--model", "mlp-nano", "--data", "digits", "--json", str(file)]
    with EmulatedNetwork(hosts=2, rate="40mbit") as network:
        run = network.run(
            [sys.executable, "-m", "efficient_dl.cli", *command],
            environment={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            quiet=True,
            timeout_seconds=200,
        )
    assert run.exit_code == 0, run.output
    found = json.loads(file.read_text())["measurements"]
    assert found["ranks_per_node"] == [1, 1]
    speeds = [found["exchange"], found["native"], *found["links"]]
    for speed in speeds:
        assert speed["bytes_per_second"] == pytest.approx(40 * MEGABIT, rel=0.15)
